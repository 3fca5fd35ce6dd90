"""The gate of a SwiGLU feed-forward in one pass over memory, in Triton.

Suffixes: T packed tokens, F feed-forward width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sightline_kernels.launch import Launch, block_of, warps_for

BLOCK = 1024
"""Most columns of one program."""
MOST_PIECES = 65535
"""CUDA's limit on the second axis of a grid."""


def refusal(width: int) -> str | None:
    """Why a feed-forward of this width can't be gated here, or None."""
    if width > BLOCK * MOST_PIECES:
        return f"a feed-forward width of {width} is more than the {BLOCK * MOST_PIECES} that a grid covers"
    return None


def silu_mul(gate_up_T2F: Tensor) -> Tensor:
    """The twin of ``reference.silu_mul``."""
    num_rows, width = gate_up_T2F.shape[0], gate_up_T2F.shape[1] // 2
    out_TF = torch.empty(num_rows, width, dtype=gate_up_T2F.dtype, device=gate_up_T2F.device)
    plan(gate_up_T2F, out_TF).run()
    return out_TF


def plan(gate_up_T2F: Tensor, out_TF: Tensor) -> Launch:
    """The launch that fills ``out_TF``."""
    num_rows, width = out_TF.shape
    assert gate_up_T2F.stride(1) == 1, f"rows must lie whole, not in steps of {gate_up_T2F.stride(1)}"
    block = min(BLOCK, block_of(width))
    return Launch(
        _silu_mul,
        (num_rows, -(-width // block)),
        {"gate_up_ptr": gate_up_T2F, "out_ptr": out_TF, "row_stride": gate_up_T2F.stride(0)},
        {"WIDTH": width, "BLOCK": block},
        warps_for(block, out_TF.dtype),
    )


@triton.jit
def _silu_mul(gate_up_ptr: "Any", out_ptr: "Any", row_stride: "Any", WIDTH: tl.constexpr, BLOCK: tl.constexpr) -> None:
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate_ptr = gate_up_ptr + row * row_stride
    gate = tl.load(gate_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + WIDTH + columns, mask=inside, other=0.0).to(tl.float32)
    gated = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * WIDTH + columns, gated.to(out_ptr.dtype.element_ty), mask=inside)
