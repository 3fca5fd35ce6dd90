"""Linear layers over NF4 weights for few rows of input, in Triton; many rows dequantize first.

As ``int8_linear/fused.py``: weights on the left, the input width split among programs. A byte is two weights, and a
table of 256 pairs, which stays in the first-level cache, turns it into both with one load: fewer instructions than
choosing one number in sixteen twice, and about as many from old versions of Triton as from new ones. A block's scale
meets its sum, not its weights: one multiplication for 64 weights. Compressed scales are made whole there too, so that
memory holds and reads an eighth of a bit for a weight where float32 ones are half a bit.
Suffixes: I input width, O output width, R rows of input, S parts of the input width, Q packed bytes, K blocks,
P values of a byte, C groups of scales.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sightline_kernels.int8_linear.fused import (
    LEAST_ROWS,
    MOST_ROWS,
    TILE_ROWS,
    plan_sum,
    precision_of,
    row_tiles,
    split_count,
)
from sightline_kernels.launch import Launch, block_of
from sightline_kernels.nf4_linear.reference import BLOCK_SIZE, BytePairs, CompressedScales, Scales

OUTPUTS = 128
"""Outputs of one program."""
DEQUANTIZED = 64
"""Blocks that one program makes whole."""


def refusal(in_features: int) -> str | None:
    """Why weights of this width can't be multiplied here, or None."""
    if in_features % BLOCK_SIZE:
        return f"an input width of {in_features} is no multiple of {BLOCK_SIZE}, so blocks run over rows' ends"
    return None


def nf4_linear(
    x_I: Tensor,
    packed_Q: Tensor,
    scales: Scales,
    pairs: BytePairs,
    bias_O: Tensor | None,
    out_features: int,
) -> Tensor:
    """The twin of ``reference.nf4_linear`` for blocks of 64."""
    in_features = x_I.shape[-1]
    x_RI = x_I.reshape(-1, in_features)
    if x_RI.shape[0] > MOST_ROWS:
        weight_OI = torch.empty(out_features, in_features, dtype=x_I.dtype, device=x_I.device)
        plan_dequantize(packed_Q, scales, pairs, weight_OI).run()
        return F.linear(x_I, weight_OI, bias_O)
    y_RO = torch.empty(x_RI.shape[0], out_features, dtype=x_I.dtype, device=x_I.device)
    parts = split_count(x_RI.shape[0], out_features, in_features, OUTPUTS, BLOCK_SIZE)
    if parts == 1:
        plan(x_RI, packed_Q, scales, pairs, bias_O, y_RO[None]).run()
    else:
        part_SRO = torch.empty(parts, *y_RO.shape, dtype=torch.float32, device=x_I.device)
        plan(x_RI, packed_Q, scales, pairs, None, part_SRO).run()
        plan_sum(part_SRO, bias_O, y_RO).run()
    return y_RO.view(*x_I.shape[:-1], out_features)


def plan(
    x_RI: Tensor, packed_Q: Tensor, scales: Scales, pairs: BytePairs, bias_O: Tensor | None, part_SRO: Tensor
) -> Launch:
    """The launch that fills ``part_SRO``, whose sum over S is the product; a bias is added to each part."""
    parts, rows, out_features = part_SRO.shape
    in_features = x_RI.shape[1]
    weight, group = _arguments(packed_Q, scales, pairs, x_RI.dtype)
    tile = max(LEAST_ROWS, min(TILE_ROWS, block_of(rows)))
    return Launch(
        _nf4_linear,
        (row_tiles(rows) * -(-out_features // OUTPUTS), parts),
        {
            "x_ptr": x_RI.contiguous(), **weight, "bias_ptr": weight["absmax_ptr"] if bias_O is None else bias_O,
            "part_ptr": part_SRO, "rows": rows, "row_tiles": row_tiles(rows),
        },
        {
            "OUT": out_features, "IN": in_features, "TURNS": -(-in_features // (BLOCK_SIZE * parts)),
            "BIASED": bias_O is not None, "ROWS": tile, "OUTPUTS": OUTPUTS,
            "BLOCK_SIZE": BLOCK_SIZE, "GROUP": group, "PRECISION": precision_of(x_RI.dtype),
        },
        # Of the most rows, fewer warps spill registers on sm_120.
        num_warps=8 if tile == TILE_ROWS else 4,
        num_stages=4,
    )  # fmt: skip


def plan_dequantize(packed_Q: Tensor, scales: Scales, pairs: BytePairs, weight_OI: Tensor) -> Launch:
    """The launch that fills ``weight_OI`` as ``reference.dequantize`` would, in one pass."""
    blocks = weight_OI.numel() // BLOCK_SIZE
    weight, group = _arguments(packed_Q, scales, pairs, torch.float32)
    return Launch(
        _dequantize,
        (-(-blocks // DEQUANTIZED),),
        {**weight, "weight_ptr": weight_OI, "blocks": blocks},
        {"BLOCKS": DEQUANTIZED, "BLOCK_SIZE": BLOCK_SIZE, "GROUP": group},
        num_warps=4,
    )


def _arguments(packed_Q: Tensor, scales: Scales, pairs: BytePairs, dtype: torch.dtype) -> tuple[dict[str, Tensor], int]:
    """What the kernels take of a weight, and how many compressed scales make a group, 0 for float32 ones.

    The numbers that bytes stand for are taken in ``dtype``: in half of it, their table is half as large.
    """
    if dtype == torch.float32:
        # Two float32 numbers move as one of 64 bits.
        pairs_P = pairs.float32_P2.view(torch.int64).view(-1)
    else:
        pairs_P = pairs.half_2P[0 if dtype == torch.bfloat16 else 1]
    if isinstance(scales, CompressedScales):
        absmax, codes_K, map_P, offset_C = scales.absmax_C, scales.codes_K, scales.map_P, scales.offset_C
        group = scales.group
    else:
        # What isn't read needs an address all the same.
        absmax = codes_K = map_P = offset_C = scales
        group = 0
    return {
        "packed_ptr": packed_Q,
        "absmax_ptr": absmax,
        "codes_ptr": codes_K,
        "map_ptr": map_P,
        "offset_ptr": offset_C,
        "pairs_ptr": pairs_P,
    }, group


@triton.jit
def _pairs_of(pairs_ptr: "Any", bytes: "Any", KIND: tl.constexpr) -> "Any":
    """The two numbers that each byte stands for, in the dtype KIND of the table."""
    pair = tl.load(pairs_ptr + bytes.to(tl.int32))
    if pairs_ptr.dtype.element_ty == tl.int64:
        first = (pair & 0xFFFFFFFF).to(tl.uint32).to(KIND, bitcast=True)
        second = (pair >> 32).to(tl.uint32).to(KIND, bitcast=True)
    else:
        first = (pair & 0xFFFF).to(tl.uint16).to(KIND, bitcast=True)
        second = (pair >> 16).to(tl.uint16).to(KIND, bitcast=True)
    return first, second


@triton.jit
def _scales_at(
    absmax_ptr: "Any",
    codes_ptr: "Any",
    map_ptr: "Any",
    offset_ptr: "Any",
    at: "Any",
    live: "Any",
    GROUP: tl.constexpr,
) -> "Any":
    """The scales of these blocks, float32."""
    if GROUP == 0:
        scale = tl.load(absmax_ptr + at, mask=live, other=0.0)
    else:
        code = tl.load(codes_ptr + at, mask=live, other=0).to(tl.int32)
        group = at // GROUP
        absmax = tl.load(absmax_ptr + group, mask=live, other=0.0)
        offset = tl.load(offset_ptr + group, mask=live, other=0.0)
        # Spelled so, product and sum round apart, as bitsandbytes' do.
        scale = tl.fma(tl.load(map_ptr + code), absmax, 0.0) + offset
    return scale


@triton.jit(do_not_specialize=["rows", "row_tiles"])
def _nf4_linear(
    x_ptr: "Any",
    packed_ptr: "Any",
    absmax_ptr: "Any",
    codes_ptr: "Any",
    map_ptr: "Any",
    offset_ptr: "Any",
    pairs_ptr: "Any",
    bias_ptr: "Any",
    part_ptr: "Any",
    rows: "Any",
    row_tiles: "Any",
    OUT: tl.constexpr,
    IN: tl.constexpr,
    TURNS: tl.constexpr,
    BIASED: tl.constexpr,
    ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    HALF: tl.constexpr = BLOCK_SIZE // 2
    kind: tl.constexpr = x_ptr.dtype.element_ty
    part = tl.program_id(1).to(tl.int64)
    outputs = (tl.program_id(0) // row_tiles).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    halves, inputs = tl.arange(0, HALF), tl.arange(0, BLOCK_SIZE)
    block = part * TURNS
    packed_ptrs = packed_ptr + outputs[:, None] * (IN // 2) + (block * HALF + halves)[None, :]
    x_ptrs = x_ptr + row[:, None] * IN + (block * BLOCK_SIZE + inputs)[None, :]
    row_blocks = outputs * (IN // BLOCK_SIZE)
    sums = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for turn in range(TURNS):
        left = (IN // BLOCK_SIZE - block - turn) * BLOCK_SIZE
        bytes = tl.load(packed_ptrs, mask=(outputs < OUT)[:, None] & (halves < left)[None, :], other=0)
        x = tl.load(x_ptrs, mask=(row < rows)[:, None] & (inputs < left)[None, :], other=0.0)
        even, odd = tl.split(tl.reshape(x, (ROWS, HALF, 2)))
        first, second = _pairs_of(pairs_ptr, bytes, kind)
        block_sums = tl.dot(first, tl.trans(even), input_precision=PRECISION)
        block_sums = tl.dot(second, tl.trans(odd), block_sums, input_precision=PRECISION)
        # Past the last block sums are zero, and any scale will do.
        scale_at = row_blocks + tl.minimum(block + turn, IN // BLOCK_SIZE - 1)
        scale = _scales_at(absmax_ptr, codes_ptr, map_ptr, offset_ptr, scale_at, outputs < OUT, GROUP)
        sums += block_sums * scale[:, None]
        packed_ptrs += HALF
        x_ptrs += BLOCK_SIZE
    if BIASED:
        sums += tl.load(bias_ptr + outputs, mask=outputs < OUT, other=0.0).to(tl.float32)[:, None]
    part_ptrs = part_ptr + (part * rows + row[None, :]) * OUT + outputs[:, None]
    out: tl.constexpr = part_ptr.dtype.element_ty
    tl.store(part_ptrs, sums.to(out), mask=(outputs < OUT)[:, None] & (row < rows)[None, :])


@triton.jit
def _dequantize(
    packed_ptr: "Any",
    absmax_ptr: "Any",
    codes_ptr: "Any",
    map_ptr: "Any",
    offset_ptr: "Any",
    pairs_ptr: "Any",
    weight_ptr: "Any",
    blocks: "Any",
    BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP: tl.constexpr,
) -> None:
    HALF: tl.constexpr = BLOCK_SIZE // 2
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    halves, numbers = tl.arange(0, HALF), tl.arange(0, BLOCK_SIZE)
    live = block < blocks
    bytes = tl.load(packed_ptr + block[:, None] * HALF + halves[None, :], mask=live[:, None], other=0)
    first, second = _pairs_of(pairs_ptr, bytes, tl.float32)
    scale = _scales_at(absmax_ptr, codes_ptr, map_ptr, offset_ptr, block, live, GROUP)
    weight = tl.reshape(tl.join(first, second), (BLOCKS, BLOCK_SIZE)) * scale[:, None]
    weight_ptrs = weight_ptr + block[:, None] * BLOCK_SIZE + numbers[None, :]
    tl.store(weight_ptrs, weight.to(weight_ptr.dtype.element_ty), mask=live[:, None])
