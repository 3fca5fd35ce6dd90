"""Residual add and root-mean-square norm in one pass over memory, in Triton.

One program a row, which it holds whole. Knows nothing of layers. Suffixes: T packed tokens, D model width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sightline_kernels.launch import Launch, block_of, warps_for

WIDEST = 16384
"""A program holds its row in registers; a wider one would spill."""


def refusal(width: int) -> str | None:
    """Why rows of this width can't be normed here, or None."""
    if width > WIDEST:
        return f"rows of {width} numbers don't fit one program's registers, {WIDEST} do"
    return None


def add_rms_norm(x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The twin of ``reference.add_rms_norm``."""
    normed_TD = torch.empty(x_TD.shape, dtype=x_TD.dtype, device=x_TD.device)
    summed_TD = x_TD if residual_TD is None else torch.empty_like(normed_TD)
    plan(x_TD, residual_TD, weight_D, eps, normed_TD, summed_TD).run()
    return normed_TD, summed_TD


def plan(
    x_TD: Tensor, residual_TD: Tensor | None, weight_D: Tensor, eps: float, normed_TD: Tensor, summed_TD: Tensor
) -> Launch:
    """The launch that fills ``normed_TD`` and, with a residual, ``summed_TD``."""
    num_rows, width = x_TD.shape
    added_TD = x_TD if residual_TD is None else residual_TD
    assert x_TD.stride(1) == added_TD.stride(1) == weight_D.stride(0) == 1, f"{x_TD.stride()} {added_TD.stride()}"
    block = block_of(width)
    return Launch(
        _add_rms_norm,
        (num_rows,),
        {
            "x_ptr": x_TD,
            "residual_ptr": added_TD,
            "weight_ptr": weight_D,
            "normed_ptr": normed_TD,
            "summed_ptr": summed_TD,
            "x_stride": x_TD.stride(0),
            "residual_stride": added_TD.stride(0),
            "eps": eps,
        },
        {"WIDTH": width, "BLOCK": block, "HAS_RESIDUAL": residual_TD is not None},
        warps_for(block, x_TD.dtype),
    )


@triton.jit
def _add_rms_norm(
    x_ptr: "Any",
    residual_ptr: "Any",
    weight_ptr: "Any",
    normed_ptr: "Any",
    summed_ptr: "Any",
    x_stride: "Any",
    residual_stride: "Any",
    eps: "Any",
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    x = tl.load(x_ptr + row * x_stride + columns, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row * residual_stride + columns, mask=inside, other=0.0).to(tl.float32)
        summed = x.to(summed_ptr.dtype.element_ty)
        tl.store(summed_ptr + row * WIDTH + columns, summed, mask=inside)
        # The norm is of the sum as later layers see it, rounded.
        x = summed.to(tl.float32)
    mean_square = tl.sum(x * x, axis=0) / WIDTH
    normed = x * (1.0 / tl.sqrt(mean_square + eps)) * weight
    tl.store(normed_ptr + row * WIDTH + columns, normed.to(normed_ptr.dtype.element_ty), mask=inside)
