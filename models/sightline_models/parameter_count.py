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

_PICTURE_CONSTANTS_BYTES = 2 * 3 * 4
"""Mean and deviation of three channels, in float32."""

_NF4_BLOCK = 64
_NF4_TABLE_BYTES = 256 * 2 * 4
"""What each byte of two numbers stands for, kept by every NF4 layer."""


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


def weight_bytes(config: VlmConfig, precision: str, rest: str = "bfloat16", *, on_cpu: bool = False) -> int:
    """Bytes that a loaded model holds, to the byte: weights, rotary tables and the constants of its pictures.

    Where ``precision`` is one of ``QUANTIZED_BITS`` it is that of the decoder's linears, quantized at load, and
    ``rest`` that of all else. A CPU multiplies with weights in an order of its own, so a tied head is kept twice there.
    """
    count, decoder = count_parameters(config), config.decoder
    rest = precision if precision in ITEM_BYTES else rest
    item = ITEM_BYTES[rest]
    kept = count.total - count.decoder_linears if precision in QUANTIZED_BITS else count.total
    tables = 2 * decoder.max_position_embeddings * decoder.head_dim
    if decoder.tie_word_embeddings and on_cpu and rest != "float16":
        kept += decoder.vocab_size * decoder.hidden_size
    quantized = 0
    if precision in QUANTIZED_BITS:
        quantized = decoder.num_layers * sum(_quantized_bytes(*matrix, precision) for matrix in _matrices(decoder))
    return quantized + item * (kept + tables) + _PICTURE_CONSTANTS_BYTES


def kv_bytes_per_token(decoder: DecoderConfig, precision: str) -> int:
    """Bytes that one token's keys and values take over all layers, at a precision of ``ITEM_BYTES``."""
    return 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * ITEM_BYTES[precision]


def _matrices(decoder: DecoderConfig) -> tuple[tuple[tuple[int, ...], int], ...]:
    """A layer's matrices as they are kept: the rows of those that are one after another in it, and the columns."""
    width, query, key = (
        decoder.hidden_size,
        decoder.num_heads * decoder.head_dim,
        decoder.num_kv_heads * decoder.head_dim,
    )
    between = decoder.intermediate_size
    return ((query, key, key), width), ((width,), query), ((between, between), width), ((width,), between)


def _quantized_bytes(parts: tuple[int, ...], columns: int, scheme: str) -> int:
    if scheme == "int8":
        return sum(parts) * (columns + 4)
    if any(rows * columns % _NF4_BLOCK for rows in parts[:-1]):
        # Blocks that aren't in step can't be kept as one matrix.
        return sum(_quantized_bytes((rows,), columns, scheme) for rows in parts)
    numbers = sum(parts) * columns
    return -(-numbers // 2) + 4 * -(-numbers // _NF4_BLOCK) + _NF4_TABLE_BYTES


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
