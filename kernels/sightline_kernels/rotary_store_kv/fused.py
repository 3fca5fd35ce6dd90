"""Turns a step's queries and keys by their positions and writes keys and values to their slots, in one Triton launch.

A program takes some heads of one token: of its queries, or of its keys and values. Knows nothing of sequences or
attention. Suffixes as in ``layout.py``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sightline_kernels.launch import Launch, block_of, warps_for

TILE = 1024
"""Pairs of dimensions that one program turns."""


def refusal(head_dim: int) -> str | None:
    """Why heads of this width can't be turned here, or None."""
    if head_dim % 2 or head_dim > 2 * TILE:
        return f"heads of {head_dim} numbers can't be turned in pairs, even widths up to {2 * TILE} can"
    return None


def rotary_store_kv(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    k_cache_NPGD: Tensor,
    v_cache_NPGD: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """The twin of ``reference.rotary_store_kv``."""
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    plan(q_THD, k_TGD, v_TGD, cos_TD, sin_TD, k_cache_NPGD, v_cache_NPGD, slots_T, out_THD).run()
    return out_THD


def plan(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    k_cache_NPGD: Tensor,
    v_cache_NPGD: Tensor,
    slots_T: Tensor,
    out_THD: Tensor,
) -> Launch:
    """The launch that fills ``out_THD`` and the slots."""
    num_tokens, num_heads, head_dim = q_THD.shape
    num_kv_heads = k_TGD.shape[1]
    for rows_TXD in (q_THD, k_TGD, v_TGD):
        assert rows_TXD.stride()[1:] == (head_dim, 1), f"a token's heads must lie side by side: {rows_TXD.stride()}"
    for whole in (cos_TD, sin_TD, k_cache_NPGD, v_cache_NPGD, out_THD):
        assert whole.is_contiguous(), f"shape {tuple(whole.shape)} has strides {whole.stride()}"
    half_block = block_of(head_dim // 2)
    heads_block = min(block_of(max(num_heads, num_kv_heads)), max(1, TILE // half_block))
    return Launch(
        _rotary_store_kv,
        (num_tokens, -(-num_heads // heads_block) + -(-num_kv_heads // heads_block)),
        {
            "q_ptr": q_THD,
            "k_ptr": k_TGD,
            "v_ptr": v_TGD,
            "cos_ptr": cos_TD,
            "sin_ptr": sin_TD,
            "out_ptr": out_THD,
            "k_cache_ptr": k_cache_NPGD,
            "v_cache_ptr": v_cache_NPGD,
            "slots_ptr": slots_T,
            "q_stride": q_THD.stride(0),
            "k_stride": k_TGD.stride(0),
            "v_stride": v_TGD.stride(0),
        },
        {
            "NUM_HEADS": num_heads,
            "NUM_KV_HEADS": num_kv_heads,
            "HALF": head_dim // 2,
            "HEADS_BLOCK": heads_block,
            "HALF_BLOCK": half_block,
        },
        warps_for(heads_block * half_block, q_THD.dtype),
    )


@triton.jit
def _turn(
    from_ptr: "Any",
    to_ptr: "Any",
    cos_ptr: "Any",
    sin_ptr: "Any",
    at: "Any",
    inside: "Any",
    dims: "Any",
    HALF: tl.constexpr,
) -> None:
    in_half = dims < HALF
    cos_low = tl.load(cos_ptr + dims, mask=in_half, other=0.0).to(tl.float32)
    cos_high = tl.load(cos_ptr + HALF + dims, mask=in_half, other=0.0).to(tl.float32)
    sin_low = tl.load(sin_ptr + dims, mask=in_half, other=0.0).to(tl.float32)
    sin_high = tl.load(sin_ptr + HALF + dims, mask=in_half, other=0.0).to(tl.float32)
    low = tl.load(from_ptr + at, mask=inside, other=0.0).to(tl.float32)
    high = tl.load(from_ptr + HALF + at, mask=inside, other=0.0).to(tl.float32)
    kind = to_ptr.dtype.element_ty
    tl.store(to_ptr + at, (low * cos_low[None, :] + high * sin_low[None, :]).to(kind), mask=inside)
    tl.store(to_ptr + HALF + at, (high * cos_high[None, :] + low * sin_high[None, :]).to(kind), mask=inside)


@triton.jit
def _rotary_store_kv(
    q_ptr: "Any",
    k_ptr: "Any",
    v_ptr: "Any",
    cos_ptr: "Any",
    sin_ptr: "Any",
    out_ptr: "Any",
    k_cache_ptr: "Any",
    v_cache_ptr: "Any",
    slots_ptr: "Any",
    q_stride: "Any",
    k_stride: "Any",
    v_stride: "Any",
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HEADS_BLOCK: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    QUERY_PIECES: tl.constexpr = (NUM_HEADS + HEADS_BLOCK - 1) // HEADS_BLOCK
    dims = tl.arange(0, HALF_BLOCK)
    cos_ptr += token * (2 * HALF)
    sin_ptr += token * (2 * HALF)
    if piece < QUERY_PIECES:
        heads = piece * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
        inside = (heads < NUM_HEADS)[:, None] & (dims < HALF)[None, :]
        at = heads[:, None] * (2 * HALF) + dims[None, :]
        to_ptr = out_ptr + token * (NUM_HEADS * 2 * HALF)
        _turn(q_ptr + token * q_stride, to_ptr, cos_ptr, sin_ptr, at, inside, dims, HALF)
    else:
        heads = (piece - QUERY_PIECES) * HEADS_BLOCK + tl.arange(0, HEADS_BLOCK)
        inside = (heads < NUM_KV_HEADS)[:, None] & (dims < HALF)[None, :]
        at = heads[:, None] * (2 * HALF) + dims[None, :]
        slot = tl.load(slots_ptr + token).to(tl.int64) * (NUM_KV_HEADS * 2 * HALF)
        _turn(k_ptr + token * k_stride, k_cache_ptr + slot, cos_ptr, sin_ptr, at, inside, dims, HALF)
        v_ptr += token * v_stride
        v_cache_ptr += slot
        v_low = tl.load(v_ptr + at, mask=inside)
        v_high = tl.load(v_ptr + HALF + at, mask=inside)
        tl.store(v_cache_ptr + at, v_low, mask=inside)
        tl.store(v_cache_ptr + HALF + at, v_high, mask=inside)
