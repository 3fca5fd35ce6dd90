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
_NF4_GROUP = 256
"""Scales that share two float32 numbers of their own, where they are compressed to eight bits."""
_NF4_MAP_BYTES = 256 * 4
"""What each eight bits of a scale stand for, kept by every layer of compressed scales."""
_NF4_TABLE_BYTES = 256 * (2 * 4 + 2 * 4)
"""What each byte of two numbers stands for, in float32 and in two half precisions, kept by every NF4 layer."""


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
    config: VlmConfig, precision: str, rest: str = "bfloat16", *, on_cpu: bool = False, vision: bool = False
) -> int:
    """Bytes that a loaded model holds, to the byte: weights, rotary tables and the constants of its pictures.

    Where ``precision`` is one of ``QUANTIZED_BITS`` it is that of the decoder's linears, and with ``vision`` of those
    of tower and projector, and ``rest`` that of all else. A CPU multiplies with weights in an order of its own, so a
    tied head is kept twice there.
    """
    count, decoder = count_parameters(config), config.decoder
    rest = precision if precision in ITEM_BYTES else rest
    kept, quantized = count.total, 0
    if precision in QUANTIZED_BITS:
        matrices = _decoder_matrices(decoder)
        kept -= count.decoder_linears
        if vision:
            matrices += _vision_matrices(config)
            kept -= count.vision_linears
        compressed = config.compressed_scales
        quantized = sum(_quantized_bytes(*matrix, precision, compressed) for matrix in matrices)
    tables = 2 * decoder.max_position_embeddings * decoder.head_dim
    if decoder.tie_word_embeddings and on_cpu and rest != "float16":
        kept += decoder.vocab_size * decoder.hidden_size
    return quantized + ITEM_BYTES[rest] * (kept + tables) + _PICTURE_CONSTANTS_BYTES


def kv_bytes_per_token(decoder: DecoderConfig, precision: str) -> int:
    """Bytes that one token's keys and values take over all layers, at a precision of ``ITEM_BYTES``."""
    return 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * ITEM_BYTES[precision]


Matrix = tuple[tuple[int, ...], int]
"""As it is kept: the rows of those that are one after another in it, and the columns."""


def _decoder_matrices(decoder: DecoderConfig) -> list[Matrix]:
    width, query, key = (
        decoder.hidden_size,
        decoder.num_heads * decoder.head_dim,
        decoder.num_kv_heads * decoder.head_dim,
    )
    between = decoder.intermediate_size
    layer: list[Matrix] = [((query, key, key), width), ((width,), query), ((between, between), width)]
    return decoder.num_layers * [*layer, ((width,), between)]


def _vision_matrices(config: VlmConfig) -> list[Matrix]:
    width, between, projector = config.vision.hidden_size, config.vision.intermediate_size, config.projector
    layer: list[Matrix] = [((width,) * 3, width), ((width,), width), ((between,), width), ((width,), between)]
    return max(config.feature_depths) * layer + [
        ((projector.out_size,), projector.in_size),
        ((projector.out_size,), projector.out_size),
    ]


def _quantized_bytes(parts: tuple[int, ...], columns: int, scheme: str, compressed: bool) -> int:
    if scheme == "int8":
        return sum(parts) * (columns + 4)
    blocks = [-(-rows * columns // _NF4_BLOCK) for rows in parts]
    if any(rows * columns % _NF4_BLOCK for rows in parts[:-1]):
        # Blocks that aren't in step can't be kept as one matrix.
        return sum(_quantized_bytes((rows,), columns, scheme, compressed) for rows in parts)
    scales = 4 * sum(blocks)
    if compressed and all(count % _NF4_GROUP == 0 for count in blocks[:-1]):
        scales = sum(blocks) + 8 * -(-sum(blocks) // _NF4_GROUP) + _NF4_MAP_BYTES
    return -(-sum(parts) * columns // 2) + scales + _NF4_TABLE_BYTES


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
