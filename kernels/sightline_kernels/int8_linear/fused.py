"""Linear layers over int8 weights for few rows of input, in Triton; many rows dequantize first.

The weights stand on the left of the product: they are converted in registers, which is where Hopper's matrix
instructions take their left side from, while the few rows of input wait in shared memory. A decode step is bound by
reading weights, so the input width is split among programs until every multiprocessor has some; their sums meet in a
second, small launch, in an order that never changes. An output wide enough for all of them is not split.
Suffixes: I input width, O output width, R rows of input, S parts of the input width.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from sightline_kernels.launch import Launch, block_of

MOST_ROWS = 192
"""More rows of input than this are bound by arithmetic: one pass that dequantizes, then the library's product."""
LEAST_ROWS, TILE_ROWS = 16, 64
"""Rows of one program: a matrix instruction takes no fewer, and of more the sums would not stay in registers."""
OUTPUTS, INPUTS = 64, 128
"""The weights of one program and turn."""
PROGRAMS = 264
"""Two for each multiprocessor of an H200; smaller GPUs take turns."""
SUMMED = 1024
"""Outputs that one program adds up."""
DEQUANTIZED = 4096
"""Weights that one program makes whole."""


def refusal(in_features: int) -> str | None:
    """Why weights of this width can't be multiplied here, or None."""
    if in_features % 16:
        return f"an input width of {in_features} is no multiple of 16, which wide loads of int8 rows need"
    return None


def int8_linear(x_I: Tensor, codes_OI: Tensor, absmax_O: Tensor, bias_O: Tensor | None) -> Tensor:
    """The twin of ``reference.int8_linear``."""
    x_RI = x_I.reshape(-1, x_I.shape[-1])
    if x_RI.shape[0] > MOST_ROWS:
        weight_OI = torch.empty(codes_OI.shape, dtype=x_I.dtype, device=x_I.device)
        plan_dequantize(codes_OI, absmax_O, weight_OI).run()
        return F.linear(x_I, weight_OI, bias_O)
    out_features, in_features = codes_OI.shape
    y_RO = torch.empty(x_RI.shape[0], out_features, dtype=x_I.dtype, device=x_I.device)
    parts = split_count(x_RI.shape[0], out_features, in_features, OUTPUTS, INPUTS)
    if parts == 1:
        plan(x_RI, codes_OI, absmax_O, bias_O, y_RO[None]).run()
    else:
        part_SRO = torch.empty(parts, *y_RO.shape, dtype=torch.float32, device=x_I.device)
        plan(x_RI, codes_OI, absmax_O, None, part_SRO).run()
        plan_sum(part_SRO, bias_O, y_RO).run()
    return y_RO.view(*x_I.shape[:-1], out_features)


def split_count(rows: int, out_features: int, in_features: int, outputs: int, inputs: int) -> int:
    """How many programs, of ``outputs`` x ``inputs`` a turn, share an input width: a matter of shapes alone."""
    tiles = max(1, row_tiles(rows)) * -(-out_features // outputs)
    return max(1, min(-(-PROGRAMS // tiles), in_features // (2 * inputs)))


def row_tiles(rows: int) -> int:
    """Programs that share a tile of weights, one after another: all but the first find it in a cache."""
    return -(-rows // TILE_ROWS)


def plan(x_RI: Tensor, codes_OI: Tensor, absmax_O: Tensor, bias_O: Tensor | None, part_SRO: Tensor) -> Launch:
    """The launch that fills ``part_SRO``, whose sum over S is the product; a bias is added to each part."""
    parts, rows, out_features = part_SRO.shape
    in_features = codes_OI.shape[1]
    turns = -(-in_features // (INPUTS * parts))
    return Launch(
        _int8_linear,
        (row_tiles(rows) * -(-out_features // OUTPUTS), parts),
        {
            "x_ptr": x_RI.contiguous(), "codes_ptr": codes_OI, "absmax_ptr": absmax_O,
            # What isn't read needs an address all the same.
            "bias_ptr": absmax_O if bias_O is None else bias_O, "part_ptr": part_SRO, "rows": rows,
            "row_tiles": row_tiles(rows),
        },
        {
            "OUT": out_features, "IN": in_features, "TURNS": turns, "BIASED": bias_O is not None,
            # Compiled for 32 rows and sm_120, registers spill.
            "ROWS": LEAST_ROWS if rows <= LEAST_ROWS else TILE_ROWS,
            "OUTPUTS": OUTPUTS, "INPUTS": INPUTS, "PRECISION": precision_of(x_RI.dtype),
        },
        num_warps=4,
        num_stages=4,
    )  # fmt: skip


def plan_dequantize(codes_OI: Tensor, absmax_O: Tensor, weight_OI: Tensor) -> Launch:
    """The launch that fills ``weight_OI`` as ``reference.dequantize`` would, in one pass."""
    out_features, in_features = codes_OI.shape
    block = min(DEQUANTIZED, block_of(in_features))
    return Launch(
        _dequantize,
        (out_features, -(-in_features // block)),
        {"codes_ptr": codes_OI, "absmax_ptr": absmax_O, "weight_ptr": weight_OI},
        {"IN": in_features, "BLOCK": block},
        num_warps=4,
    )


def plan_sum(part_SRO: Tensor, bias_O: Tensor | None, y_RO: Tensor) -> Launch:
    """The launch that adds ``part_SRO`` up over S, adds the bias and rounds once, to the dtype of ``y_RO``."""
    parts, rows, out_features = part_SRO.shape
    block = min(SUMMED, block_of(out_features))
    return Launch(
        _sum_parts,
        (rows, -(-out_features // block)),
        {"part_ptr": part_SRO, "bias_ptr": y_RO if bias_O is None else bias_O, "y_ptr": y_RO, "rows": rows},
        {"PARTS": parts, "OUT": out_features, "BIASED": bias_O is not None, "BLOCK": block},
        num_warps=4,
    )


def precision_of(dtype: torch.dtype) -> str:
    """How a product of two numbers of ``dtype`` is made: float32 as it is, not cut to TF32."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit(do_not_specialize=["rows", "row_tiles"])
def _int8_linear(
    x_ptr: "Any",
    codes_ptr: "Any",
    absmax_ptr: "Any",
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
    INPUTS: tl.constexpr,
    PRECISION: tl.constexpr,
) -> None:
    part = tl.program_id(1).to(tl.int64)
    outputs = (tl.program_id(0) // row_tiles).to(tl.int64) * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.program_id(0) % row_tiles * ROWS + tl.arange(0, ROWS)
    first = part * TURNS * INPUTS
    inputs = tl.arange(0, INPUTS)
    codes_ptrs = codes_ptr + outputs[:, None] * IN + (first + inputs)[None, :]
    x_ptrs = x_ptr + row[None, :] * IN + (first + inputs)[:, None]
    sums = tl.zeros((OUTPUTS, ROWS), tl.float32)
    for turn in range(TURNS):
        left = IN - first - turn * INPUTS
        codes = tl.load(codes_ptrs, mask=(outputs < OUT)[:, None] & (inputs < left)[None, :], other=0)
        x = tl.load(x_ptrs, mask=(row < rows)[None, :] & (inputs < left)[:, None], other=0.0)
        sums = tl.dot(codes.to(x.dtype), x, sums, input_precision=PRECISION)
        codes_ptrs += INPUTS
        x_ptrs += INPUTS
    scale = tl.load(absmax_ptr + outputs, mask=outputs < OUT, other=0.0) / 127.0
    sums *= scale[:, None]
    if BIASED:
        sums += tl.load(bias_ptr + outputs, mask=outputs < OUT, other=0.0).to(tl.float32)[:, None]
    part_ptrs = part_ptr + (part * rows + row[None, :]) * OUT + outputs[:, None]
    kind: tl.constexpr = part_ptr.dtype.element_ty
    tl.store(part_ptrs, sums.to(kind), mask=(outputs < OUT)[:, None] & (row < rows)[None, :])


@triton.jit
def _dequantize(codes_ptr: "Any", absmax_ptr: "Any", weight_ptr: "Any", IN: tl.constexpr, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    inputs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = inputs < IN
    # Rounded as torch rounds it: the other division is a little off.
    scale = tl.div_rn(tl.load(absmax_ptr + row), 127.0)
    codes = tl.load(codes_ptr + row * IN + inputs, mask=inside, other=0)
    weight = codes.to(tl.float32) * scale
    tl.store(weight_ptr + row * IN + inputs, weight.to(weight_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def _sum_parts(
    part_ptr: "Any",
    bias_ptr: "Any",
    y_ptr: "Any",
    rows: "Any",
    PARTS: tl.constexpr,
    OUT: tl.constexpr,
    BIASED: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    outputs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = outputs < OUT
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(PARTS):
        total += tl.load(part_ptr + (part * rows + row) * OUT + outputs, mask=inside, other=0.0)
    if BIASED:
        total += tl.load(bias_ptr + outputs, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * OUT + outputs, total.to(y_ptr.dtype.element_ty), mask=inside)
