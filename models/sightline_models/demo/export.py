"""A trained demo model as a checkpoint folder in Hugging Face's LLaVA layout.

Knows files. Knows no training.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

from sightline_models.demo.network import DECODER, PROJECTOR, TOWER, Shape, Weights
from sightline_models.demo.text import BOS, CHAT_TEMPLATE, EOS, IMAGE, PAD, to_json
from sightline_models.presets import CLIP_MEAN, CLIP_STD

# As published LLaVA-1.5 checkpoints name them.
_PUBLISHED = {
    TOWER: "vision_tower.vision_model",
    PROJECTOR: "multi_modal_projector",
    DECODER: "language_model.model",
    "lm_head": "language_model.lm_head",
}


def export(weights: Weights, shape: Shape, tokenizer: Tokenizer, folder: Path) -> None:
    """Write ``folder``: weights in bfloat16, configuration, processor, tokenizer and chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        _published(name): value.detach().to("cpu", torch.bfloat16).contiguous() for name, value in weights.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    processor = _image_processor(shape)
    _write(folder / "config.json", _config(shape))
    _write(
        folder / "generation_config.json",
        {"bos_token_id": BOS, "do_sample": False, "eos_token_id": EOS, "pad_token_id": PAD},
    )
    _write(
        folder / "processor_config.json",
        {
            "image_processor": processor,
            "image_token": "<image>",
            "num_additional_image_tokens": 1,
            "patch_size": shape.patch_size,
            "processor_class": "LlavaProcessor",
            "vision_feature_select_strategy": "default",
        },
    )
    _write(folder / "preprocessor_config.json", {**processor, "processor_class": "LlavaProcessor"})
    _write(
        folder / "tokenizer_config.json",
        {
            "bos_token": "<s>",
            "clean_up_tokenization_spaces": False,
            "eos_token": "</s>",
            "extra_special_tokens": {"image_token": "<image>"},
            "image_token": "<image>",
            "model_max_length": shape.positions,
            "pad_token": "<pad>",
            "padding_side": "left",
            "processor_class": "LlavaProcessor",
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": "<unk>",
        },
    )
    (folder / "tokenizer.json").write_text(to_json(tokenizer), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors makes its file readable for the owner only


def _published(name: str) -> str:
    for ours, theirs in _PUBLISHED.items():
        if name.startswith(f"{ours}."):
            return theirs + name[len(ours) :]
    raise KeyError(name)


def _write(path: Path, fields: dict[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _image_processor(shape: Shape) -> dict[str, Any]:
    """Every picture is resized to a square, whatever its shape: nothing is cut off, and all of the square is used."""
    side = {"height": shape.image_size, "width": shape.image_size}
    return {
        "crop_size": side,
        "do_center_crop": False,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(CLIP_MEAN),
        "image_processor_type": "CLIPImageProcessor",
        "image_std": list(CLIP_STD),
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": side,
    }


def _config(shape: Shape) -> dict[str, Any]:
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "dtype": "bfloat16",
        "image_seq_length": shape.patches,
        "image_token_index": IMAGE,
        "model_type": "llava",
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": {
            "attention_bias": False,
            "bos_token_id": BOS,
            "eos_token_id": EOS,
            "head_dim": shape.head_dim,
            "hidden_act": "silu",
            "hidden_size": shape.width,
            "intermediate_size": shape.decoder_mlp,
            "max_position_embeddings": shape.positions,
            "mlp_bias": False,
            "model_type": "llama",
            "num_attention_heads": shape.heads,
            "num_hidden_layers": shape.decoder_layers,
            "num_key_value_heads": shape.heads,
            "pad_token_id": PAD,
            "rms_norm_eps": shape.eps,
            "rope_parameters": {"rope_theta": shape.rope_theta, "rope_type": "default"},
            "tie_word_embeddings": False,
            "vocab_size": shape.vocab_size,
        },
        "tie_word_embeddings": False,
        "vision_config": {
            "hidden_act": "quick_gelu",
            "hidden_size": shape.width,
            "image_size": shape.image_size,
            "intermediate_size": shape.tower_mlp,
            "layer_norm_eps": shape.eps,
            "model_type": "clip_vision_model",
            "num_attention_heads": shape.heads,
            "num_channels": 3,
            "num_hidden_layers": shape.tower_layers,
            "patch_size": shape.patch_size,
            "projection_dim": shape.width,
        },
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "default",
    }
