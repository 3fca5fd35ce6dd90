"""Writes a step's keys and values to their cache slots in one launch, in Triton.

Knows slots. Knows nothing of sequences or attention. Suffixes as in ``layout.py``.
"""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from sightline_kernels.launch import Launch, block_of, warps_for

BLOCK = 1024
"""Most numbers of a token's keys that one program copies."""


def refusal() -> str | None:
    """Nothing is refused: any number of heads of any width is copied."""
    return None


def store_kv(
    k_TGD: Tensor,
    v_TGD: Tensor,
    k_cache_NPGD: Tensor,
    v_cache_NPGD: Tensor,
    slots_T: Tensor,
) -> None:
    """The twin of ``reference.store_kv``."""
    plan(k_TGD, v_TGD, k_cache_NPGD, v_cache_NPGD, slots_T).run()


def plan(k_TGD: Tensor, v_TGD: Tensor, k_cache_NPGD: Tensor, v_cache_NPGD: Tensor, slots_T: Tensor) -> Launch:
    """The launch that fills the slots."""
    num_tokens, num_kv_heads, head_dim = k_TGD.shape
    for rows_TGD in (k_TGD, v_TGD):
        assert rows_TGD.stride()[1:] == (head_dim, 1), f"a token's heads must lie side by side: {rows_TGD.stride()}"
    assert k_cache_NPGD.is_contiguous(), f"strides of the keys' cache: {k_cache_NPGD.stride()}"
    assert v_cache_NPGD.is_contiguous(), f"strides of the values' cache: {v_cache_NPGD.stride()}"
    width = num_kv_heads * head_dim
    block = min(BLOCK, block_of(width))
    return Launch(
        _store_kv,
        (num_tokens, -(-width // block)),
        {
            "k_ptr": k_TGD,
            "v_ptr": v_TGD,
            "k_cache_ptr": k_cache_NPGD,
            "v_cache_ptr": v_cache_NPGD,
            "slots_ptr": slots_T,
            "k_stride": k_TGD.stride(0),
            "v_stride": v_TGD.stride(0),
        },
        {"WIDTH": width, "BLOCK": block},
        warps_for(block, k_TGD.dtype),
    )


@triton.jit
def _store_kv(
    k_ptr: "Any",
    v_ptr: "Any",
    k_cache_ptr: "Any",
    v_cache_ptr: "Any",
    slots_ptr: "Any",
    k_stride: "Any",
    v_stride: "Any",
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    slot = tl.load(slots_ptr + token).to(tl.int64)
    k = tl.load(k_ptr + token * k_stride + columns, mask=inside)
    v = tl.load(v_ptr + token * v_stride + columns, mask=inside)
    tl.store(k_cache_ptr + slot * WIDTH + columns, k, mask=inside)
    tl.store(v_cache_ptr + slot * WIDTH + columns, v, mask=inside)
