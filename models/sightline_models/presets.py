"""Named model shapes, and checkpoint folders without weights made from them.

Knows files and numbers. Imports no torch: the API process and the command line read shapes from here.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sightline_models.synthetic_tokenizer import SPECIAL_TOKENS, tokenizer_json

_BOS, _EOS, _PAD, _IMAGE = (SPECIAL_TOKENS.index(token) for token in ("<s>", "</s>", "<pad>", "<image>"))

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- if message['role'] == 'user' %}{{ 'USER: ' }}
{%- elif message['role'] == 'assistant' %}{{ 'ASSISTANT: ' }}{% endif %}
{%- if message['content'] is string %}{{ message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{%- if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}
{%- endfor %}
{%- endif %}
{%- if message['role'] == 'assistant' %}{{ '</s>' }}{% else %}{{ ' ' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}
"""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Every number a LLaVA's shape hangs on."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vision_hidden_size: int
    vision_intermediate_size: int
    vision_num_layers: int
    """In the checkpoint: with feature layer -2 the last one is never run."""
    vision_num_heads: int
    image_size: int
    patch_size: int
    head_dim: int | None = None
    """None: hidden_size / num_heads."""
    max_position_embeddings: int = 4096
    rope_parameters: Mapping[str, Any] | None = None
    """None: default rotary positions with theta 10000."""
    rms_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    projector_bias: bool = True
    feature_layers: int | tuple[int, ...] = -2
    select_strategy: str = "default"

    @property
    def num_patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2


_VIT_L_14_336: Mapping[str, Any] = {
    "vision_hidden_size": 1024,
    "vision_intermediate_size": 4096,
    "vision_num_layers": 24,
    "vision_num_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}

PRESETS: Mapping[str, Preset] = {
    "llava-1.5-7b": Preset(
        vocab_size=32064,
        hidden_size=4096,
        intermediate_size=11008,
        num_layers=32,
        num_heads=32,
        num_kv_heads=32,
        **_VIT_L_14_336,
    ),
    "llava-1.5-13b": Preset(
        vocab_size=32064,
        hidden_size=5120,
        intermediate_size=13824,
        num_layers=40,
        num_heads=40,
        num_kv_heads=40,
        **_VIT_L_14_336,
    ),
    "llava-110m": Preset(
        vocab_size=8192,
        hidden_size=768,
        intermediate_size=2048,
        num_layers=12,
        num_heads=12,
        num_kv_heads=6,
        vision_hidden_size=384,
        vision_intermediate_size=1536,
        vision_num_layers=12,
        vision_num_heads=6,
        image_size=224,
        patch_size=16,
    ),
    "llava-45m": Preset(
        vocab_size=8192,
        hidden_size=512,
        intermediate_size=1376,
        num_layers=8,
        num_heads=8,
        num_kv_heads=4,
        vision_hidden_size=384,
        vision_intermediate_size=1536,
        vision_num_layers=7,
        vision_num_heads=6,
        image_size=192,
        patch_size=16,
    ),
    "tiny": Preset(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        vision_hidden_size=32,
        vision_intermediate_size=64,
        vision_num_layers=3,
        vision_num_heads=2,
        image_size=32,
        patch_size=8,
        max_position_embeddings=2048,
    ),
}
"""The published shapes, two that a CPU serves at speed (named by their parameters), and one for tests."""


def demo_checkpoint() -> Path:
    """The folder of the bundled model."""
    return Path(__file__).parent / "demo" / "checkpoint"


def write_preset(name: str, folder: Path) -> None:
    """Make ``folder`` a checkpoint of a named shape, whole but for its weights.

    Raises KeyError for a name that is not in ``PRESETS``.
    """
    write_files(PRESETS[name], folder)


def write_files(preset: Preset, folder: Path, *, dtype: str = "bfloat16", legacy: bool = False) -> None:
    """Write config, generation config, processor, chat template and tokenizer in Hugging Face layout.

    ``legacy`` spells config and processor as checkpoints published before transformers 5 do.
    """
    folder.mkdir(parents=True, exist_ok=True)
    files: dict[str, Any] = {
        "config.json": _config(preset, dtype, legacy),
        "generation_config.json": {
            "bos_token_id": _BOS,
            "do_sample": True,
            "eos_token_id": _EOS,
            "pad_token_id": _PAD,
            "temperature": 1.0,
        },
        "tokenizer.json": tokenizer_json(preset.vocab_size),
        "tokenizer_config.json": {
            "bos_token": "<s>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "</s>",
            "extra_special_tokens": {"image_token": "<image>"},
            "image_token": "<image>",
            "model_max_length": preset.max_position_embeddings,
            "pad_token": "<pad>",
            "padding_side": "left",
            "processor_class": "LlavaProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
        },
    }
    processor = {
        "image_token": "<image>",
        "num_additional_image_tokens": 1,
        "patch_size": preset.patch_size,
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": preset.select_strategy,
    }
    if legacy:
        files["preprocessor_config.json"] = _image_processor(preset)
        files["processor_config.json"] = processor
    else:
        files["processor_config.json"] = {"image_processor": _image_processor(preset), **processor}
    for file_name, content in files.items():
        (folder / file_name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")


def _config(preset: Preset, dtype: str, legacy: bool) -> dict[str, Any]:
    rope = dict(preset.rope_parameters or {"rope_theta": 10000.0, "rope_type": "default"})
    text = {
        "attention_bias": preset.attention_bias,
        "bos_token_id": _BOS,
        "eos_token_id": _EOS,
        "hidden_act": "silu",
        "hidden_size": preset.hidden_size,
        "intermediate_size": preset.intermediate_size,
        "max_position_embeddings": preset.max_position_embeddings,
        "mlp_bias": preset.mlp_bias,
        "model_type": "llama",
        "num_attention_heads": preset.num_heads,
        "num_hidden_layers": preset.num_layers,
        "num_key_value_heads": preset.num_kv_heads,
        "pad_token_id": _PAD,
        "rms_norm_eps": preset.rms_norm_eps,
        "tie_word_embeddings": preset.tie_word_embeddings,
        "vocab_size": preset.vocab_size,
    }
    if preset.head_dim is not None:
        text["head_dim"] = preset.head_dim
    if legacy:
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = rope if rope.get("rope_type", "default") != "default" else None
    else:
        text["rope_parameters"] = rope
    layers = preset.feature_layers
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "torch_dtype" if legacy else "dtype": dtype,
        "image_seq_length": preset.num_patches + (preset.select_strategy == "full"),
        "image_token_index": _IMAGE,
        "model_type": "llava",
        "multimodal_projector_bias": preset.projector_bias,
        "projector_hidden_act": "gelu",
        "text_config": text,
        "tie_word_embeddings": preset.tie_word_embeddings,
        "vision_config": {
            "hidden_act": "quick_gelu",
            "hidden_size": preset.vision_hidden_size,
            "image_size": preset.image_size,
            "intermediate_size": preset.vision_intermediate_size,
            "layer_norm_eps": 1e-5,
            "model_type": "clip_vision_model",
            "num_attention_heads": preset.vision_num_heads,
            "num_hidden_layers": preset.vision_num_layers,
            "patch_size": preset.patch_size,
            "projection_dim": preset.vision_hidden_size,
        },
        "vision_feature_layer": layers if isinstance(layers, int) else list(layers),
        "vision_feature_select_strategy": preset.select_strategy,
    }


def _image_processor(preset: Preset) -> dict[str, Any]:
    side = preset.image_size
    return {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(CLIP_MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(CLIP_STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }
