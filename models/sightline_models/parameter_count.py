"""How many numbers a model of a given shape holds, and what they and its cache weigh at each precision.

Knows shapes and bytes. Imports no torch: the command line plans with it on machines where torch doesn't work.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from sightline_models.config import DecoderConfig, VlmConfig

ITEM_BYTES: Mapping[str, int] = {"float32": 4, "bfloat16": 2, "float16": 2}
"""Precisions that every weight and the cache are kept in."""

QUANTIZED_BITS: Mapping[str, float] = {"int8": 8.0, "nf4": 4.5}
"""Bits a weight of the decoder's linears takes: nf4 keeps a float32 scale for each 64 of them, int8 one a row, which is
nothing. The rest of the model and the cache stay in a precision of ``ITEM_BYTES``."""

COMPRESSED_BITS = 4 + 8 / 64 + 64 / (64 * 256)
"""The same of nf4 whose scales are quantized too: eight bits for 64 weights, two float32 numbers for 256 of those."""


@dataclass(frozen=True)
class ParameterCount:
    """Parameters by part. A tied head counts once, tower layers that are never run not at all."""

    tower: int
    projector: int
    embedding: int
    """The token embedding, and the head where it is a table of its own."""
    decoder_linears: int
    """What quantization would shrink."""
    decoder_rest: int
    vision_linears: int
    """Of tower and projector, what it would shrink with ``--quantize-vision``; counted there already."""

    @property
    def total(self) -> int:
        return self.tower + self.projector + self.embedding + self.decoder_linears + self.decoder_rest


def count_parameters(config: VlmConfig) -> ParameterCount:
    """What is loaded for a model of this shape."""
    decoder = config.decoder
    layer = _attention(decoder) + _feed_forward(decoder)
    tables = 1 if decoder.tie_word_embeddings else 2
    return ParameterCount(
        tower=_tower(config),
        projector=_projector(config),
        embedding=tables * decoder.vocab_size * decoder.hidden_size,
        decoder_linears=decoder.num_layers * layer,
        decoder_rest=(2 * decoder.num_layers + 1) * decoder.hidden_size + decoder.num_layers * _biases(decoder),
        vision_linears=_tower_linears(config) + _projector_linears(config),
    )


def weight_bytes(
    count: ParameterCount,
    precision: str,
    rest: str = "bfloat16",
    *,
    vision: bool = False,
    compressed_scales: bool = False,
) -> int:
    """Bytes of the weights at any precision; where it is one of ``QUANTIZED_BITS``, ``rest`` is that of all others.

    ``vision`` and ``compressed_scales`` count only there: whether tower and projector are quantized, and nf4's scales.
    """
    if precision in ITEM_BYTES:
        return count.total * ITEM_BYTES[precision]
    linears = count.decoder_linears + (count.vision_linears if vision else 0)
    bits = COMPRESSED_BITS if compressed_scales and precision == "nf4" else QUANTIZED_BITS[precision]
    return int(linears * bits / 8) + ITEM_BYTES[rest] * (count.total - linears)


def kv_bytes_per_token(decoder: DecoderConfig, precision: str) -> int:
    """Bytes that one token's keys and values take over all layers, at a precision of ``ITEM_BYTES``."""
    return 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * ITEM_BYTES[precision]


def _attention(decoder: DecoderConfig) -> int:
    heads = decoder.num_heads + 2 * decoder.num_kv_heads
    return (heads + decoder.num_heads) * decoder.head_dim * decoder.hidden_size


def _feed_forward(decoder: DecoderConfig) -> int:
    return 3 * decoder.hidden_size * decoder.intermediate_size


def _biases(decoder: DecoderConfig) -> int:
    heads = decoder.num_heads + 2 * decoder.num_kv_heads
    attention = heads * decoder.head_dim + decoder.hidden_size
    feed_forward = 2 * decoder.intermediate_size + decoder.hidden_size
    return attention * decoder.attention_bias + feed_forward * decoder.mlp_bias


def _tower(config: VlmConfig) -> int:
    tower = config.vision
    width = tower.hidden_size
    embeddings = 3 * tower.patch_size**2 * width + width + (tower.num_patches + 1) * width + 2 * width
    biases = 4 * width + tower.intermediate_size + width
    return embeddings + _tower_linears(config) + max(config.feature_depths) * (biases + 4 * width)


def _tower_linears(config: VlmConfig) -> int:
    width = config.vision.hidden_size
    return max(config.feature_depths) * (4 * width * width + 2 * width * config.vision.intermediate_size)


def _projector(config: VlmConfig) -> int:
    return _projector_linears(config) + 2 * config.projector.bias * config.projector.out_size


def _projector_linears(config: VlmConfig) -> int:
    projector = config.projector
    return projector.out_size * (projector.in_size + projector.out_size)
