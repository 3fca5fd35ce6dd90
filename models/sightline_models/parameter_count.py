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
    )


def weight_bytes(count: ParameterCount, precision: str, rest: str = "bfloat16") -> int:
    """Bytes of the weights at any precision; where it is one of ``QUANTIZED_BITS``, ``rest`` is that of all others."""
    if precision in ITEM_BYTES:
        return count.total * ITEM_BYTES[precision]
    quantized = int(count.decoder_linears * QUANTIZED_BITS[precision] / 8)
    return quantized + ITEM_BYTES[rest] * (count.total - count.decoder_linears)


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
    attention = 4 * width * width + 4 * width
    feed_forward = 2 * width * tower.intermediate_size + tower.intermediate_size + width
    return embeddings + max(config.feature_depths) * (attention + feed_forward + 4 * width)


def _projector(config: VlmConfig) -> int:
    projector = config.projector
    return projector.out_size * (projector.in_size + projector.out_size + 2 * projector.bias)
