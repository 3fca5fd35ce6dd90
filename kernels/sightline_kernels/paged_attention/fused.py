"""Causal attention of packed queries over the paged cache, in Triton.

A decode row's keys are split among programs and the parts merged; a longer slice is cut into tiles of queries. Grids
depend on host numbers alone, so that a step of decodes can be captured in a graph. Knows the layout's geometry. Knows
nothing of requests or of who wrote the cache. Suffixes as in ``layout.py``; S parts of a decode row's keys.
"""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sightline_kernels.launch import Launch, block_of
from sightline_kernels.layout import PagedLayout

WIDEST_HEAD = 256
DECODE_PROGRAMS = 512
"""Keys are split until a step has about so many decode programs: some for each processor of a large GPU."""
MOST_PARTS = 32
DECODE_KEY_BYTES = 2**14
SLICE_KEY_BYTES = 2**13
SLICE_QUERY_BYTES = 2**14
"""Keys and queries that a program holds at a time. Compiled for the smaller cards, more would spill or not fit."""
LEAST_ROWS = 16
"""A matrix product takes no fewer rows: query heads that share a key head are padded to it."""


def refusal(num_heads: int, num_kv_heads: int, head_dim: int) -> str | None:
    """Why these heads can't be attended here, or None."""
    if head_dim > WIDEST_HEAD:
        return f"heads of {head_dim} numbers don't fit one program, {WIDEST_HEAD} do"
    if num_heads % num_kv_heads:
        return f"{num_heads} query heads can't share {num_kv_heads} key heads evenly"
    return None


def paged_attention(
    q_THD: Tensor,
    k_cache_NPGD: Tensor,
    v_cache_NPGD: Tensor,
    layout: PagedLayout,
    scale: float,
) -> Tensor:
    """The twin of ``reference.paged_attention``, but for row-invariant steps."""
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
    for launch in plan(q_THD, k_cache_NPGD, v_cache_NPGD, layout, scale, out_THD):
        launch.run()
    return out_THD


def plan(
    q_THD: Tensor, k_cache_NPGD: Tensor, v_cache_NPGD: Tensor, layout: PagedLayout, scale: float, out_THD: Tensor
) -> list[Launch]:
    """The launches that fill ``out_THD``, in order."""
    assert not layout.row_invariant, "a row-invariant step is for the reference"
    head_dim = q_THD.shape[2]
    assert q_THD.stride()[1:] == (head_dim, 1), f"a token's heads must lie side by side: {q_THD.stride()}"
    assert layout.block_table_BN.stride(1) == 1, f"strides of the block table: {layout.block_table_BN.stride()}"
    for whole in (k_cache_NPGD, v_cache_NPGD, out_THD):
        assert whole.is_contiguous(), f"shape {tuple(whole.shape)} has strides {whole.stride()}"
    arguments = {
        "q_ptr": q_THD,
        "k_cache_ptr": k_cache_NPGD,
        "v_cache_ptr": v_cache_NPGD,
        "table_ptr": layout.block_table_BN,
        "context_ptr": layout.context_len_B,
        "out_ptr": out_THD,
        "table_stride": layout.block_table_BN.stride(0),
        "q_stride": q_THD.stride(0),
        # Powers of two are cheaper than powers of e.
        "scale": scale / math.log(2),
    }
    launches = []
    if layout.num_decodes:
        launches += _plan_decodes(arguments, layout, q_THD, k_cache_NPGD)
    if layout.num_decodes < len(layout.query_lens):
        launches.append(_plan_slices(arguments, layout, q_THD, k_cache_NPGD))
    return launches


def _plan_decodes(arguments: dict[str, Any], layout: PagedLayout, q_THD: Tensor, k_cache_NPGD: Tensor) -> list[Launch]:
    num_rows, (_, num_heads, head_dim), num_kv_heads = layout.num_decodes, q_THD.shape, k_cache_NPGD.shape[2]
    longest = layout.block_table_BN.shape[1] * layout.block_size
    wanted = -(-DECODE_PROGRAMS // (num_rows * num_kv_heads))
    keys = _rows_at_a_time(DECODE_KEY_BYTES, q_THD)
    parts = min(block_of(wanted), block_of(-(-longest // keys)), MOST_PARTS)
    shared = num_heads // num_kv_heads
    head = {"NUM_HEADS": num_heads, "HEAD_DIM": head_dim, "D_BLOCK": max(16, block_of(head_dim)), "PARTS": parts}
    # Of one part nothing is left to merge, and these are never touched.
    sizes = (num_rows, num_heads, parts) if parts > 1 else (1, 1, 1)
    sums_BHSD = torch.empty(*sizes, head_dim, dtype=torch.float32, device=q_THD.device)
    peaks_BHS = torch.empty(sizes, dtype=torch.float32, device=q_THD.device)
    totals_BHS = torch.empty(sizes, dtype=torch.float32, device=q_THD.device)
    kept = {"sums_ptr": sums_BHSD, "peaks_ptr": peaks_BHS, "totals_ptr": totals_BHS}
    attend = Launch(
        _decode,
        (num_rows, num_kv_heads, parts),
        {**arguments, **kept},
        {
            **head,
            "NUM_KV_HEADS": num_kv_heads,
            "SHARED": shared,
            "SHARED_BLOCK": 1 if shared == 1 else max(LEAST_ROWS, block_of(shared)),
            "BLOCK_SIZE": layout.block_size,
            "KEYS": keys,
        },
        num_warps=4,
    )
    if parts == 1:
        return [attend]
    merge = Launch(_merge, (num_rows, num_heads), {**kept, "out_ptr": arguments["out_ptr"]}, head, num_warps=4)
    return [attend, merge]


def _plan_slices(arguments: dict[str, Any], layout: PagedLayout, q_THD: Tensor, k_cache_NPGD: Tensor) -> Launch:
    num_tokens, num_heads, head_dim = q_THD.shape
    num_sequences = len(layout.query_lens)
    queries = _rows_at_a_time(SLICE_QUERY_BYTES, q_THD)
    # Each slice may end with a tile that isn't full.
    tiles = (num_tokens - layout.num_decodes) // queries + num_sequences - layout.num_decodes
    return Launch(
        _slices,
        (tiles, num_heads),
        {
            **arguments,
            "starts_ptr": layout.cu_seqlens_B1,
            "first_sequence": layout.num_decodes,
            "num_sequences": num_sequences,
        },
        {
            "NUM_HEADS": num_heads,
            "NUM_KV_HEADS": k_cache_NPGD.shape[2],
            "HEAD_DIM": head_dim,
            "D_BLOCK": max(16, block_of(head_dim)),
            "BLOCK_SIZE": layout.block_size,
            "QUERIES": queries,
            "KEYS": _rows_at_a_time(SLICE_KEY_BYTES, q_THD),
        },
        num_warps=4,
    )


def _rows_at_a_time(num_bytes: int, q_THD: Tensor) -> int:
    # Float32 counts double: its products aren't the tensor cores' and hold more registers.
    size = q_THD.dtype.itemsize
    return max(16, min(64, num_bytes // (block_of(q_THD.shape[2]) * size * (size // 2))))


@triton.jit
def _places(
    row_ptr: "Any",
    at: "Any",
    live: "Any",
    kv_head: "Any",
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
) -> "Any":
    """Where in the caches the keys at these positions of a sequence begin."""
    block = tl.load(row_ptr + at // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    return ((block * BLOCK_SIZE + at % BLOCK_SIZE) * NUM_KV_HEADS + kv_head) * HEAD_DIM


@triton.jit(do_not_specialize=["table_stride"])
def _decode(
    q_ptr: "Any",
    k_cache_ptr: "Any",
    v_cache_ptr: "Any",
    table_ptr: "Any",
    context_ptr: "Any",
    out_ptr: "Any",
    sums_ptr: "Any",
    peaks_ptr: "Any",
    totals_ptr: "Any",
    table_stride: "Any",
    q_stride: "Any",
    scale: "Any",
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    SHARED: tl.constexpr,
    SHARED_BLOCK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    part = tl.program_id(2)
    context = tl.load(context_ptr + row)
    each = tl.cdiv(tl.cdiv(context, PARTS), KEYS) * KEYS
    first = part * each
    last = tl.minimum(first + each, context)
    table_row_ptr = table_ptr + row * table_stride
    dims = tl.arange(0, D_BLOCK)
    in_head = dims < HEAD_DIM
    if SHARED_BLOCK == 1:
        q = tl.load(q_ptr + row * q_stride + kv_head * HEAD_DIM + dims, mask=in_head, other=0.0).to(tl.float32)
        # Of shape [1], as the sums over an axis that is kept.
        peak = tl.full([1], float("-inf"), tl.float32)
        total = tl.zeros([1], tl.float32)
        summed = tl.zeros([1, D_BLOCK], tl.float32)
    else:
        rows = tl.arange(0, SHARED_BLOCK)
        in_rows = (rows < SHARED)[:, None] & in_head[None, :]
        heads = kv_head * SHARED + rows
        q_at = heads[:, None] * HEAD_DIM + dims[None, :]
        q = tl.load(q_ptr + row * q_stride + q_at, mask=in_rows, other=0.0)
        peak = tl.full([SHARED_BLOCK], float("-inf"), tl.float32)
        total = tl.zeros([SHARED_BLOCK], tl.float32)
        summed = tl.zeros([SHARED_BLOCK, D_BLOCK], tl.float32)
    for start in range(first, last, KEYS):
        at = start + tl.arange(0, KEYS)
        live = at < last
        places = _places(table_row_ptr, at, live, kv_head, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE)
        inside = live[:, None] & in_head[None, :]
        k = tl.load(k_cache_ptr + places[:, None] + dims[None, :], mask=inside, other=0.0)
        v = tl.load(v_cache_ptr + places[:, None] + dims[None, :], mask=inside, other=0.0)
        if SHARED_BLOCK == 1:
            scores = tl.sum(q[None, :] * k.to(tl.float32), axis=1)[None, :] * scale
        else:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(live[None, :], scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_peak[:, None])
        fading = tl.exp2(peak - new_peak)
        total = total * fading + tl.sum(weights, axis=1)
        if SHARED_BLOCK == 1:
            added = tl.sum(tl.trans(weights) * v.to(tl.float32), axis=0)[None, :]
        else:
            added = tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        summed = summed * fading[:, None] + added
        peak = new_peak
    lanes = tl.arange(0, SHARED_BLOCK)
    mine = lanes < SHARED
    lane_heads = row * NUM_HEADS + kv_head * SHARED + lanes
    in_out = mine[:, None] & in_head[None, :]
    if PARTS == 1:
        out = summed / total[:, None]
        out_at = lane_heads[:, None] * HEAD_DIM + dims[None, :]
        tl.store(out_ptr + out_at, out.to(out_ptr.dtype.element_ty), mask=in_out)
    else:
        lane_parts = lane_heads * PARTS + part
        tl.store(sums_ptr + lane_parts[:, None] * HEAD_DIM + dims[None, :], summed, mask=in_out)
        tl.store(peaks_ptr + lane_parts, peak, mask=mine)
        tl.store(totals_ptr + lane_parts, total, mask=mine)


@triton.jit
def _merge(
    sums_ptr: "Any",
    peaks_ptr: "Any",
    totals_ptr: "Any",
    out_ptr: "Any",
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_BLOCK: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    head = tl.program_id(0).to(tl.int64) * NUM_HEADS + tl.program_id(1)
    parts = head * PARTS + tl.arange(0, PARTS)
    dims = tl.arange(0, D_BLOCK)
    in_head = dims < HEAD_DIM
    peaks = tl.load(peaks_ptr + parts)
    # A part without keys has the peak -inf and weighs nothing; the first part always has some.
    weights = tl.exp2(peaks - tl.max(peaks, axis=0))
    total = tl.sum(weights * tl.load(totals_ptr + parts), axis=0)
    sums = tl.load(sums_ptr + parts[:, None] * HEAD_DIM + dims[None, :], mask=in_head[None, :], other=0.0)
    out = tl.sum(weights[:, None] * sums, axis=0) / total
    tl.store(out_ptr + head * HEAD_DIM + dims, out.to(out_ptr.dtype.element_ty), mask=in_head)


@triton.jit(do_not_specialize=["table_stride", "first_sequence", "num_sequences"])
def _slices(
    q_ptr: "Any",
    k_cache_ptr: "Any",
    v_cache_ptr: "Any",
    table_ptr: "Any",
    context_ptr: "Any",
    out_ptr: "Any",
    starts_ptr: "Any",
    table_stride: "Any",
    q_stride: "Any",
    scale: "Any",
    first_sequence: "Any",
    num_sequences: "Any",
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_BLOCK: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    head = tl.program_id(1)
    # A sequence's first tile is no earlier than the tokens and the unfinished tiles of those before it allow: a bound
    # that is known without counting, and that the last sequence not beyond this tile is searched by.
    zero = tl.load(starts_ptr + first_sequence)
    sequence = first_sequence
    beyond = num_sequences
    while beyond - sequence > 1:
        middle = (sequence + beyond) // 2
        reached = (tl.load(starts_ptr + middle) - zero) // QUERIES + middle - first_sequence <= tile
        sequence = tl.where(reached, middle, sequence)
        beyond = tl.where(reached, beyond, middle)
    begin = tl.load(starts_ptr + sequence)
    num_queries = tl.load(starts_ptr + sequence + 1) - begin
    first_query = (tile - (begin - zero) // QUERIES - sequence + first_sequence) * QUERIES
    if first_query < num_queries:
        context = tl.load(context_ptr + sequence)
        table_row_ptr = table_ptr + sequence.to(tl.int64) * table_stride
        kv_head = head // (NUM_HEADS // NUM_KV_HEADS)
        dims = tl.arange(0, D_BLOCK)
        in_head = dims < HEAD_DIM
        queries = first_query + tl.arange(0, QUERIES)
        in_tile = (queries < num_queries)[:, None] & in_head[None, :]
        tokens = (begin + queries).to(tl.int64)
        columns = head * HEAD_DIM + dims
        q = tl.load(q_ptr + tokens[:, None] * q_stride + columns[None, :], mask=in_tile, other=0.0)
        positions = context - num_queries + queries
        last = tl.minimum(context, context - num_queries + first_query + QUERIES)
        peak = tl.full([QUERIES], float("-inf"), tl.float32)
        total = tl.zeros([QUERIES], tl.float32)
        summed = tl.zeros([QUERIES, D_BLOCK], tl.float32)
        for start in range(0, last, KEYS):
            at = start + tl.arange(0, KEYS)
            live = at < last
            places = _places(table_row_ptr, at, live, kv_head, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE)
            inside = live[:, None] & in_head[None, :]
            k = tl.load(k_cache_ptr + places[:, None] + dims[None, :], mask=inside, other=0.0)
            v = tl.load(v_cache_ptr + places[:, None] + dims[None, :], mask=inside, other=0.0)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            scores = tl.where((at[None, :] <= positions[:, None]) & live[None, :], scores, float("-inf"))
            # Every query sees key 0, so that a peak is a number from the first keys on.
            new_peak = tl.maximum(peak, tl.max(scores, axis=1))
            weights = tl.exp2(scores - new_peak[:, None])
            fading = tl.exp2(peak - new_peak)
            total = total * fading + tl.sum(weights, axis=1)
            summed = summed * fading[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
            peak = new_peak
        out = (summed / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + tokens[:, None] * (NUM_HEADS * HEAD_DIM) + columns[None, :], out, mask=in_tile)
