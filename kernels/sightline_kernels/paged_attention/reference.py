"""Causal attention of packed queries over the paged cache, in plain torch.

Decode rows are computed together, each longer slice by itself. Knows the layout's geometry. Knows nothing of requests
or of who wrote the cache. Suffixes as in ``layout.py``; R is the query heads that share a key head (H = G * R), K the
keys looked at.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline_kernels.layout import PagedLayout
from sightline_kernels.paged_attention.by_blocks import (
    BlockKeys,
    attend_by_blocks,
    can_attend_by_blocks,
    locate_blocks,
)
from sightline_kernels.paged_attention.in_place import RowKeys, attend_in_place, can_attend_in_place, locate_keys
from sightline_kernels.paged_attention.places import blocks_of_heads

INVARIANT_KEYS = 256
"""Row-invariant attention pads the keys of a row to a multiple of this."""
GATHERED_BYTES = 2**29
"""Keys and values that decode rows copy out of the cache at a time, at most: padded to the longest row, those of many
rows would fill a GPU."""


def paged_attention(
    q_THD: Tensor,
    k_cache_NPGD: Tensor,
    v_cache_NPGD: Tensor,
    layout: PagedLayout,
    scale: float,
) -> Tensor:
    """Return out_THD: each query attends to its sequence's cached tokens up to and including its own position."""
    if layout.row_invariant:
        return _row_by_row(q_THD, k_cache_NPGD, v_cache_NPGD, layout, scale)
    pieces = []
    if layout.num_decodes:
        pieces.append(_decode_rows(q_THD[: layout.num_decodes], k_cache_NPGD, v_cache_NPGD, layout, scale))
    start = layout.num_decodes
    for sequence in range(layout.num_decodes, len(layout.query_lens)):
        stop = start + layout.query_lens[sequence]
        pieces.append(_slice(q_THD[start:stop], k_cache_NPGD, v_cache_NPGD, layout, sequence, scale))
        start = stop
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _decode_rows(
    q_BHD: Tensor, k_cache_NPGD: Tensor, v_cache_NPGD: Tensor, layout: PagedLayout, scale: float
) -> Tensor:
    """One query a sequence, all at once, with keys up to the longest context."""
    num_rows, num_heads, head_dim = q_BHD.shape
    if can_attend_in_place(q_BHD):
        keys: RowKeys | None = layout.memo.get("decode_keys")
        if keys is None:
            contexts = layout.context_lens[:num_rows]
            keys = locate_keys(layout, range(num_rows), contexts, max(contexts), num_heads, k_cache_NPGD)
            layout.memo["decode_keys"] = keys
        return attend_in_place(q_BHD, k_cache_NPGD, v_cache_NPGD, keys, scale)
    if can_attend_by_blocks(q_BHD):
        blocks: BlockKeys | None = layout.memo.get("decode_blocks")
        if blocks is None:
            blocks = layout.memo["decode_blocks"] = locate_blocks(layout, num_heads, k_cache_NPGD)
        return attend_by_blocks(q_BHD, k_cache_NPGD, v_cache_NPGD, blocks, scale)
    (all_blocks_BK, all_offsets_BK), all_mask_B11K = _decode_places(layout)
    num_kv_heads = k_cache_NPGD.shape[2]
    q_BGRD = q_BHD.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    rows_at_once = max(1, GATHERED_BYTES // (2 * all_mask_B11K.shape[3] * k_cache_NPGD[0, 0].nbytes))
    pieces = []
    for start in range(0, num_rows, rows_at_once):
        rows = slice(start, start + rows_at_once)
        width = max(layout.context_lens[:num_rows][rows])
        where = (all_blocks_BK[rows, :width], all_offsets_BK[rows, :width])
        k_BGKD, v_BGKD = k_cache_NPGD[where].transpose(1, 2), v_cache_NPGD[where].transpose(1, 2)
        mask_B11K = all_mask_B11K[rows, ..., :width]
        pieces.append(F.scaled_dot_product_attention(q_BGRD[rows], k_BGKD, v_BGKD, attn_mask=mask_B11K, scale=scale))
    out_BGRD = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return out_BGRD.reshape(num_rows, num_heads, head_dim)


def _decode_places(layout: PagedLayout) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Where the decode rows' keys lie, by block and offset, and which of them are a row's own."""
    if "decode_places" not in layout.memo:
        num_rows, block_size = layout.num_decodes, layout.block_size
        context_B1 = layout.context_len_B[:num_rows, None]
        positions_K = torch.arange(max(layout.context_lens[:num_rows]), device=context_B1.device)
        # Past its context a row looks at its own last token again, masked: what others left there may be NaN.
        seen_BK = torch.minimum(positions_K, context_B1 - 1)
        blocks_BK = layout.block_table_BN[:num_rows].long().gather(1, seen_BK // block_size)
        mask_B11K = (positions_K < context_B1)[:, None, None]
        layout.memo["decode_places"] = ((blocks_BK, seen_BK % block_size), mask_B11K)
    where, mask_B11K = layout.memo["decode_places"]
    return where, mask_B11K


def _slice(
    q_THD: Tensor, k_cache_NPGD: Tensor, v_cache_NPGD: Tensor, layout: PagedLayout, sequence: int, scale: float
) -> Tensor:
    """The last T tokens of one sequence, against exactly its context."""
    num_queries, num_heads, _ = q_THD.shape
    num_keys = layout.context_lens[sequence]
    k_GKD = _keys_of(k_cache_NPGD, layout, sequence, num_keys)
    v_GKD = _keys_of(v_cache_NPGD, layout, sequence, num_keys)
    if not q_THD.is_cpu and num_heads != k_GKD.shape[0]:
        # On a GPU torch has no kernel for shared heads with a mask, or in float32: it would write out every score.
        shared = num_heads // k_GKD.shape[0]
        k_GKD, v_GKD = k_GKD.repeat_interleave(shared, 0), v_GKD.repeat_interleave(shared, 0)
    mask_TK = None if num_queries == num_keys else _mask_of(layout, sequence, q_THD)
    out_1HTD = F.scaled_dot_product_attention(
        q_THD.transpose(0, 1).unsqueeze(0),
        k_GKD.unsqueeze(0),
        v_GKD.unsqueeze(0),
        attn_mask=mask_TK,
        is_causal=mask_TK is None,
        scale=scale,
        enable_gqa=num_heads != k_GKD.shape[0],
    )
    return out_1HTD[0].transpose(0, 1)


def _mask_of(layout: PagedLayout, sequence: int, q_THD: Tensor) -> Tensor:
    """What is added to the scores of a slice that doesn't begin its sequence: made once for all layers."""
    masks: dict[int, Tensor] = layout.memo.setdefault("masks", {})
    if sequence not in masks:
        num_queries, num_keys = layout.query_lens[sequence], layout.context_lens[sequence]
        hidden_TK = torch.full((num_queries, num_keys), -torch.inf, dtype=q_THD.dtype, device=q_THD.device)
        masks[sequence] = hidden_TK.triu(diagonal=num_keys - num_queries + 1)
    return masks[sequence]


def _row_by_row(q_THD: Tensor, k_cache_NPGD: Tensor, v_cache_NPGD: Tensor, layout: PagedLayout, scale: float) -> Tensor:
    """Every query by itself, its keys padded to a length that its own position alone decides."""
    if can_attend_in_place(q_THD):
        return _row_by_row_in_place(q_THD, k_cache_NPGD, v_cache_NPGD, layout, scale)
    num_heads, head_dim = q_THD.shape[1:]
    num_kv_heads = k_cache_NPGD.shape[2]
    rows = []
    for token, (sequence, num_keys) in enumerate(_rows_of(layout)):
        padding = -num_keys % INVARIANT_KEYS
        k_GKD = F.pad(_keys_of(k_cache_NPGD, layout, sequence, num_keys), (0, 0, 0, padding))
        v_GKD = F.pad(_keys_of(v_cache_NPGD, layout, sequence, num_keys), (0, 0, 0, padding))
        mask_K = torch.arange(num_keys + padding, device=q_THD.device) < num_keys
        q_GRD = q_THD[token].view(num_kv_heads, num_heads // num_kv_heads, head_dim)
        out_GRD = F.scaled_dot_product_attention(q_GRD, k_GKD, v_GKD, attn_mask=mask_K, scale=scale)
        rows.append(out_GRD.reshape(num_heads, head_dim))
    return torch.stack(rows)


def _row_by_row_in_place(
    q_THD: Tensor, k_cache_NPGD: Tensor, v_cache_NPGD: Tensor, layout: PagedLayout, scale: float
) -> Tensor:
    """Rows of one padded length share calls, whose arithmetic for a row is the same whatever the others are."""
    groups: list[tuple[list[int], RowKeys]] | None = layout.memo.get("row_keys")
    if groups is None:
        by_length: dict[int, list[int]] = {}
        rows = _rows_of(layout)
        # No context is longer than the cache, and no sparse row longer than what it picks from.
        num_slots = k_cache_NPGD.shape[0] * k_cache_NPGD.shape[1]
        for token, (_, num_keys) in enumerate(rows):
            by_length.setdefault(min(num_keys + -num_keys % INVARIANT_KEYS, num_slots), []).append(token)
        groups = []
        for padded, tokens in by_length.items():
            sequences, contexts = zip(*(rows[token] for token in tokens), strict=True)
            keys = locate_keys(layout, sequences, contexts, padded, q_THD.shape[1], k_cache_NPGD)
            groups.append((tokens, keys))
        layout.memo["row_keys"] = groups
    out_THD = torch.empty_like(q_THD)
    for tokens, keys in groups:
        out_THD[tokens] = attend_in_place(q_THD[tokens], k_cache_NPGD, v_cache_NPGD, keys, scale)
    return out_THD


def _rows_of(layout: PagedLayout) -> list[tuple[int, int]]:
    """The sequence of each packed token, and how many keys it sees."""
    return [
        (sequence, num_keys)
        for sequence, (query_len, context_len) in enumerate(zip(layout.query_lens, layout.context_lens, strict=True))
        for num_keys in range(context_len - query_len + 1, context_len + 1)
    ]


def _keys_of(cache_NPGD: Tensor, layout: PagedLayout, sequence: int, num_keys: int) -> Tensor:
    """The first ``num_keys`` cached keys (or values) of a sequence, as [G, K, D]."""
    num_blocks = -(-num_keys // layout.block_size)
    blocks_N = layout.block_table_BN[sequence, :num_blocks]
    if cache_NPGD.is_cpu:
        num_kv_heads, head_dim = cache_NPGD.shape[2:]
        rows_GN = blocks_N * num_kv_heads + torch.arange(num_kv_heads, dtype=torch.int32)[:, None]
        return (
            blocks_of_heads(cache_NPGD)
            .index_select(0, rows_GN.flatten())
            .view(num_kv_heads, -1, head_dim)[:, :num_keys]
        )
    blocks_NPGD = cache_NPGD.index_select(0, blocks_N)
    return blocks_NPGD.flatten(0, 1)[:num_keys].transpose(0, 1)
