"""Linear layers whose weight is NF4, four bits a number and one scale a block, in plain torch.

NF4 and the compression of its scales ("double quantization") are from QLoRA (Dettmers et al., arXiv 2305.14314), the
8-bit dynamic type of compressed scales from Dettmers (arXiv 1511.04561); bits and rounding are those of bitsandbytes.
Knows no checkpoint. Suffixes: I input width, O output width, N a weight's numbers in reading order, K blocks, B numbers
of a block, Q packed bytes (two numbers each, the first in the upper half), P values of a byte, C groups of scales,
G scales of a group.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_SIZE = 64
"""Numbers that share a scale where nobody asks for another count."""

# Quantiles of a normal distribution, as the paper gives them: exact zero, and both ends.
_LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

# Scales this small are divided by as if they were this large, which keeps a block of zeros finite.
_LEAST_SCALE = 1e-38

# Bytes made or read at a time: what a large weight needs beside its result stays small, and in a CPU's cache. A GPU
# wants few launches instead.
_CHUNK, _CHUNK_OF_GPU = 2**17, 2**23


@dataclass(frozen=True)
class CompressedScales:
    """Scales of eight bits each: the number that a code stands for, times its group's scale, plus its group's offset.

    bitsandbytes has one offset a matrix. One a group lets the scales of several matrices stand after one another.
    """

    codes_K: Tensor
    """uint8"""
    map_P: Tensor
    """float32, as the next two"""
    absmax_C: Tensor
    offset_C: Tensor
    group: int


Scales = Tensor | CompressedScales
"""absmax_K in float32, or compressed."""


def levels(device: torch.device) -> Tensor:
    """The 16 numbers, float32, rising."""
    return torch.tensor(_LEVELS, dtype=torch.float32, device=device)


@dataclass(frozen=True)
class BytePairs:
    """The two numbers that each byte stands for. Make it once: it is wanted each time."""

    float32_P2: Tensor
    half_2P: Tensor
    """int32: both numbers in one word, the first in its lower half; a row in bfloat16 and one in float16."""


def byte_pairs(device: torch.device) -> BytePairs:
    levels_16 = levels(device)
    pairs_P2 = torch.stack((levels_16.repeat_interleave(16), levels_16.repeat(16)), dim=1)
    words = [pairs_P2.to(dtype).view(torch.int32).view(-1) for dtype in (torch.bfloat16, torch.float16)]
    return BytePairs(pairs_P2, torch.stack(words))


def quantize(weight_OI: Tensor, block_size: int = BLOCK_SIZE) -> tuple[Tensor, Tensor]:
    """Return ``(packed_Q, absmax_K)``, uint8 and float32: each number the nearest level times its block's maximum.

    ``weight_OI`` is float32, float16 or bfloat16. Blocks run over rows' ends; the last one may be short, and an odd
    number of numbers leaves the last byte's lower half without a meaning.
    """
    flat_N = weight_OI.reshape(-1)
    midpoints = _midpoints(levels(flat_N.device))
    step = _blocks_at_once(flat_N, block_size) * block_size
    chunks = [_quantize_chunk(chunk_N.float(), block_size, midpoints) for chunk_N in torch.split(flat_N, step)]
    return torch.cat([packed_Q for packed_Q, _ in chunks]), torch.cat([absmax_K for _, absmax_K in chunks])


def _quantize_chunk(flat_N: Tensor, block_size: int, midpoints: Tensor) -> tuple[Tensor, Tensor]:
    full = flat_N.numel() // block_size * block_size
    blocks_KB, rest = flat_N[:full].view(-1, block_size), flat_N[full:]
    absmax_K = blocks_KB.abs().amax(dim=1)
    scaled_N = (blocks_KB * (1.0 / absmax_K.clamp(min=_LEAST_SCALE))[:, None]).view(-1)
    if rest.numel():
        absmax_1 = rest.abs().amax().clamp(min=_LEAST_SCALE)[None]
        absmax_K = torch.cat((absmax_K, absmax_1))
        scaled_N = torch.cat((scaled_N, rest / absmax_1))
    if scaled_N.numel() % 2:
        scaled_N = F.pad(scaled_N, (0, 1))
    codes_N = torch.bucketize(scaled_N.clamp_(-1.0, 1.0), midpoints, out_int32=True).to(torch.uint8)
    return (codes_N[::2] << 4) | codes_N[1::2], absmax_K


def dequantize(
    packed_Q: Tensor,
    scales: Scales,
    pairs: BytePairs,
    shape: tuple[int, int],
    dtype: torch.dtype,
    block_size: int = BLOCK_SIZE,
) -> Tensor:
    """Return the weight [O, I] of ``shape`` in ``dtype``: level times scale, computed in float32 and rounded once."""
    count = math.prod(shape)
    weight_N = torch.empty(count, dtype=dtype, device=packed_Q.device)
    # Two float32 numbers move as one of 64 bits.
    pairs_P = pairs.float32_P2.view(torch.int64).view(-1)
    absmax_K = expand_scales(scales)
    blocks = _blocks_at_once(packed_Q, block_size)
    for first in range(0, absmax_K.numel(), blocks):
        start, stop = first * block_size, min(count, (first + blocks) * block_size)
        codes_Q = packed_Q[start // 2 : (stop + 1) // 2].int()
        values_N = torch.index_select(pairs_P, 0, codes_Q).view(torch.float32)[: stop - start]
        full = (stop - start) // block_size
        values_N[: full * block_size].view(-1, block_size).mul_(absmax_K[first : first + full, None])
        values_N[full * block_size :].mul_(absmax_K[-1])
        weight_N[start:stop].copy_(values_N)
    return weight_N.view(shape)


def _blocks_at_once(tensor: Tensor, block_size: int) -> int:
    return max(1, 2 * (_CHUNK if tensor.is_cpu else _CHUNK_OF_GPU) // block_size)


def nf4_linear(
    x_I: Tensor,
    packed_Q: Tensor,
    scales: Scales,
    pairs: BytePairs,
    bias_O: Tensor | None,
    out_features: int,
    block_size: int = BLOCK_SIZE,
) -> Tensor:
    """Return ``x @ weight.T + bias`` over the last axis of ``x``, the weight dequantized to the dtype of ``x``."""
    shape = (out_features, x_I.shape[-1])
    return F.linear(x_I, dequantize(packed_Q, scales, pairs, shape, x_I.dtype, block_size), bias_O)


def expand_scales(scales: Scales) -> Tensor:
    """Return absmax_K in float32. A product, rounded, and then a sum, as bitsandbytes: its scales to the last bit."""
    if isinstance(scales, Tensor):
        return scales
    absmax_C, offset_C, group = scales.absmax_C, scales.offset_C, scales.group
    absmax_K = torch.index_select(scales.map_P, 0, scales.codes_K.int())
    full = absmax_K.numel() // group
    absmax_K[: full * group].view(full, group).mul_(absmax_C[:full, None]).add_(offset_C[:full, None])
    absmax_K[full * group :].mul_(absmax_C[-1]).add_(offset_C[-1])
    return absmax_K


def _midpoints(numbers: Tensor) -> Tensor:
    return (numbers[:-1] + numbers[1:]) / 2
