"""What a checkpoint folder says it is: frozen configs read from ``config.json`` and ``generation_config.json``.

Knows the fields of LLaVA checkpoints in Hugging Face layout, both generations of their spelling, and the defaults
that transformers gives to fields left out. Knows no tensors (and imports no torch), no pixels, no text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sightline_models.checkpoint_fields import CheckpointError as CheckpointError
from sightline_models.checkpoint_fields import Fields
from sightline_models.quantization_config import Quantization, read_compressed_scales, read_quantization

ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu", "relu", "silu")
DTYPES = ("bfloat16", "float16", "float32")
MAX_LAYERS = 1000
"""Of a tower or a decoder: layers are built before weights are looked at."""

# What transformers gives a LlavaConfig whose vision_config is left out altogether.
_LLAVA_VISION: Mapping[str, Any] = {
    "intermediate_size": 4096,
    "hidden_size": 1024,
    "patch_size": 14,
    "image_size": 336,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
}

# Architectures people do try, each with what to do about it.
_ARCHITECTURE_ADVICE: Mapping[str, str] = {
    "LlavaLlamaForCausalLM": (
        "this is the layout of the original LLaVA repository; convert it with transformers' "
        "convert_llava_weights_to_hf.py, or take the -hf folder of the same model"
    ),
    "LlavaNextForConditionalGeneration": "LLaVA-NeXT tiles its pictures, which this release can't do",
    "LlavaOnevisionForConditionalGeneration": "LLaVA-OneVision tiles its pictures, which this release can't do",
    "LlamaForCausalLM": "this is a text model without a vision tower",
}


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP ViT tower."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    """Pixels on a side; pictures are square."""
    patch_size: int
    layer_norm_eps: float
    hidden_act: str

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patches_per_side(self) -> int:
        return self.image_size // self.patch_size

    @property
    def num_patches(self) -> int:
        return self.patches_per_side**2


@dataclass(frozen=True)
class ProjectorConfig:
    """Linear, activation, linear: from tower features to the decoder's width."""

    in_size: int
    out_size: int
    hidden_act: str
    bias: bool


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; the last four fields belong to the scaled types alone."""

    theta: float
    type: Literal["default", "linear", "llama3"] = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0


@dataclass(frozen=True)
class DecoderConfig:
    """A Llama decoder."""

    vocab_size: int
    """Rows of the embedding: may exceed what the tokenizer knows."""
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: RopeConfig
    rms_norm_eps: float
    tie_word_embeddings: bool
    attention_bias: bool
    mlp_bias: bool
    max_position_embeddings: int
    hidden_act: str


@dataclass(frozen=True)
class VlmConfig:
    """A LLaVA: tower, projector, decoder, and how they join."""

    vision: VisionConfig
    projector: ProjectorConfig
    decoder: DecoderConfig
    image_token_id: int
    feature_layers: tuple[int, ...]
    """As the checkpoint writes them: 0 is the embedding, 1 the first layer's output, -1 the last layer's."""
    select_strategy: Literal["default", "full"]
    """``default`` drops the class token, ``full`` keeps it."""
    dtype: str
    """What the checkpoint's weights are said to be: bfloat16, float16 or float32."""
    eos_token_ids: tuple[int, ...]
    architecture: str
    is_llava15: bool
    """Whether every part is what LLaVA-1.5 has, so that its chat template may stand in for a missing one."""
    quantization: Quantization = "none"
    """How the weights on disk are quantized, those of them that are."""
    compressed_scales: bool = False
    """Whether the scales of NF4 weights on disk are quantized too."""

    @property
    def feature_depths(self) -> tuple[int, ...]:
        """``feature_layers`` as counts of tower layers run."""
        return tuple(layer % (self.vision.num_layers + 1) for layer in self.feature_layers)

    @property
    def num_image_tokens(self) -> int:
        """Decoder positions that one image takes."""
        return self.vision.num_patches + (self.select_strategy == "full")


@dataclass(frozen=True)
class GenerationDefaults:
    """How the checkpoint wants to be sampled where a request doesn't say."""

    temperature: float
    top_p: float
    top_k: int
    repetition_penalty: float
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Normalization:
    """Pixels (0 to 255) to tower input: ``(pixel * rescale_factor - mean) / std``, channel by channel."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale_factor: float


def read_config(folder: Path) -> VlmConfig:
    """Read ``config.json``; raises CheckpointError for whatever this release can't run exactly."""
    top = Fields.of_file(folder / "config.json", "a checkpoint in Hugging Face layout has one beside its weights")
    architecture = _check_kind(top)
    vision = _read_vision(top)
    decoder = _read_decoder(top)
    layers = top.get("vision_feature_layer", -2)
    feature_layers = tuple(layers) if isinstance(layers, list) else (layers,)
    if not feature_layers or not all(
        isinstance(layer, int) and -vision.num_layers - 1 <= layer <= vision.num_layers for layer in feature_layers
    ):
        raise top.error("vision_feature_layer", layers, f"layers of a tower that has {vision.num_layers}")
    strategy = top.choice("vision_feature_select_strategy", "default", ("default", "full"))
    projector = ProjectorConfig(
        in_size=vision.hidden_size * len(feature_layers),
        out_size=decoder.hidden_size,
        hidden_act=top.choice("projector_hidden_act", "gelu", ACTIVATIONS),
        bias=top.flag("multimodal_projector_bias", True),
    )
    image_token_id = top.integer("image_token_id", top.integer("image_token_index", 32000, least=0), least=0)
    if image_token_id >= decoder.vocab_size:
        raise top.error(
            "image_token_index", image_token_id, f"a token id below text_config.vocab_size ({decoder.vocab_size})"
        )
    text = top.section("text_config")
    return VlmConfig(
        vision=vision,
        projector=projector,
        decoder=decoder,
        image_token_id=image_token_id,
        feature_layers=feature_layers,
        select_strategy="full" if strategy == "full" else "default",
        dtype=_read_dtype(top, text),
        eos_token_ids=_token_ids(text, text.get("eos_token_id", 2)),
        architecture=architecture,
        is_llava15=(
            feature_layers == (-2,)
            and strategy == "default"
            and projector.hidden_act == "gelu"
            and vision.hidden_act == "quick_gelu"
        ),
        quantization=read_quantization(top),
        compressed_scales=read_compressed_scales(top),
    )


def read_generation_defaults(folder: Path, config: VlmConfig) -> GenerationDefaults:
    """Read ``generation_config.json``, by the rules of transformers' ``generate``: no ``do_sample`` means greedy.

    A folder without the file leaves OpenAI's defaults: temperature 1, nothing cut off.
    """
    path = folder / "generation_config.json"
    if not path.exists():
        return GenerationDefaults(1.0, 1.0, 0, 1.0, config.eos_token_ids)
    fields = Fields.of_file(path, "")
    eos_token_ids = _token_ids(fields, fields.get("eos_token_id", None)) or config.eos_token_ids
    penalty = fields.number("repetition_penalty", 1.0)
    if not fields.flag("do_sample", False):
        return GenerationDefaults(0.0, 1.0, 0, penalty, eos_token_ids)
    return GenerationDefaults(
        temperature=fields.number("temperature", 1.0),
        top_p=fields.number("top_p", 1.0),
        top_k=fields.integer("top_k", 0, least=0),
        repetition_penalty=penalty,
        eos_token_ids=eos_token_ids,
    )


def _check_kind(top: Fields) -> str:
    for fields in (top, top.section("text_config"), top.section("vision_config")):
        if fields is not top and fields.get("quantization_config", None):
            raise CheckpointError(
                f"{fields.where('quantization_config')}: this release reads how weights are quantized from the top "
                "level of config.json only; take the unquantized checkpoint, and --quantize if memory is short"
            )
    architecture = "LlavaForConditionalGeneration"
    found = top.get("architectures", None) or [
        architecture if top.get("model_type", None) == "llava" else f"model_type {top.get('model_type', None)!r}"
    ]
    if found != [architecture]:
        advice = _ARCHITECTURE_ADVICE.get(str(found[0]), "take a LLaVA-1.5-class checkpoint in Hugging Face layout")
        names = ", ".join(map(str, found))
        raise CheckpointError(f"{top.where('architectures')}: {names} is not served, only {architecture} is; {advice}")
    return architecture


def _read_vision(top: Fields) -> VisionConfig:
    fields = top.section("vision_config", _LLAVA_VISION)
    fields.choice("model_type", "clip_vision_model", ("clip_vision_model",))
    fields.choice("num_channels", 3, (3,))
    vision = VisionConfig(
        hidden_size=fields.integer("hidden_size", 768),
        intermediate_size=fields.integer("intermediate_size", 3072),
        num_layers=fields.integer("num_hidden_layers", 12, most=MAX_LAYERS),
        num_heads=fields.integer("num_attention_heads", 12),
        image_size=fields.integer("image_size", 224),
        patch_size=fields.integer("patch_size", 32),
        layer_norm_eps=fields.number("layer_norm_eps", 1e-5),
        hidden_act=fields.choice("hidden_act", "quick_gelu", ACTIVATIONS),
    )
    if vision.hidden_size % vision.num_heads:
        raise fields.error("hidden_size", vision.hidden_size, f"a multiple of num_attention_heads ({vision.num_heads})")
    if vision.patch_size > vision.image_size:
        raise fields.error("patch_size", vision.patch_size, f"at most image_size ({vision.image_size})")
    return vision


def _read_decoder(top: Fields) -> DecoderConfig:
    fields = top.section("text_config")
    fields.choice("model_type", "llama", ("llama",))
    hidden_size = fields.integer("hidden_size", 4096)
    num_heads = fields.integer("num_attention_heads", 32)
    num_kv_heads = fields.integer("num_key_value_heads", num_heads)
    if hidden_size % num_heads:
        raise fields.error("hidden_size", hidden_size, f"a multiple of num_attention_heads ({num_heads})")
    if num_heads % num_kv_heads:
        raise fields.error("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads ({num_heads})")
    head_dim = fields.integer("head_dim", hidden_size // num_heads)
    if head_dim % 2:
        raise fields.error("head_dim", head_dim, "even, since rotary embedding turns dimensions in pairs")
    max_positions = fields.integer("max_position_embeddings", 2048)
    return DecoderConfig(
        vocab_size=fields.integer("vocab_size", 32000),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size", 11008),
        num_layers=fields.integer("num_hidden_layers", 32, most=MAX_LAYERS),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        rope=_read_rope(fields, max_positions),
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6),
        # Either place may say so: transformers takes the text config's word when the top level denies or is silent.
        tie_word_embeddings=top.flag("tie_word_embeddings", False) or fields.flag("tie_word_embeddings", False),
        attention_bias=fields.flag("attention_bias", False),
        mlp_bias=fields.flag("mlp_bias", False),
        max_position_embeddings=max_positions,
        hidden_act=fields.choice("hidden_act", "silu", ("silu",)),
    )


def _read_rope(text: Fields, max_positions: int) -> RopeConfig:
    """Both generations: ``rope_theta`` beside ``rope_scaling``, and ``rope_parameters`` that holds it all."""
    # An old-style rope_scaling, when given, is what transformers believes.
    name = "rope_scaling" if text.get("rope_scaling", None) else "rope_parameters"
    rope = text.section(name)
    theta = rope.number("rope_theta", text.number("rope_theta", 10000.0))
    if rope.number("partial_rotary_factor", text.number("partial_rotary_factor", 1.0)) != 1.0:
        raise rope.error("partial_rotary_factor", rope.get("partial_rotary_factor", None), "1.0 or left out")
    kind = rope.choice(
        "rope_type", rope.choice("type", "default", ("default", "linear", "llama3")), ("default", "linear", "llama3")
    )
    if kind == "linear":
        return RopeConfig(theta=theta, type="linear", factor=rope.number("factor"))
    if kind == "llama3":
        return RopeConfig(
            theta=theta,
            type="llama3",
            factor=rope.number("factor"),
            low_freq_factor=rope.number("low_freq_factor"),
            high_freq_factor=rope.number("high_freq_factor"),
            original_max_position_embeddings=rope.integer("original_max_position_embeddings", max_positions),
        )
    return RopeConfig(theta=theta)


def _read_dtype(top: Fields, text: Fields) -> str:
    for fields in (top, text):
        for name in ("dtype", "torch_dtype"):
            if fields.get(name, None) is not None:
                return str(fields.choice(name, None, DTYPES))
    return "float32"


def _token_ids(fields: Fields, value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids):
        raise fields.error("eos_token_id", value, "a token id or a list of them")
    return tuple(ids)
