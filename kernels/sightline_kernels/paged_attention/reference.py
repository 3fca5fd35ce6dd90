"""Causal attention of packed queries over the paged cache, in plain torch.

Decode rows share one gather and one ``scaled_dot_product_attention``; each longer slice gets its own. Knows the
layout's geometry. Knows nothing of requests or of who wrote the cache. Suffixes as in ``layout.py``; R is the query
heads that share a key head (H = G * R), K the keys looked at.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline_kernels.layout import PagedLayout

INVARIANT_KEYS = 256
"""Row-invariant attention pads the keys of a row to a multiple of this."""


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
    """One query a sequence: gather every row's blocks up to the longest context, mask what lies past a row's own."""
    num_rows, num_heads, head_dim = q_BHD.shape
    num_kv_heads = k_cache_NPGD.shape[2]
    num_blocks = -(-max(layout.context_lens[:num_rows]) // layout.block_size)
    table_BN = layout.block_table_BN[:num_rows, :num_blocks]
    k_BGKD = k_cache_NPGD[table_BN].flatten(1, 2).transpose(1, 2)
    v_BGKD = v_cache_NPGD[table_BN].flatten(1, 2).transpose(1, 2)
    keys_K = torch.arange(num_blocks * layout.block_size, device=q_BHD.device)
    mask_B11K = (keys_K < layout.context_len_B[:num_rows, None])[:, None, None]
    q_BGRD = q_BHD.view(num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    out_BGRD = F.scaled_dot_product_attention(q_BGRD, k_BGKD, v_BGKD, attn_mask=mask_B11K, scale=scale)
    return out_BGRD.reshape(num_rows, num_heads, head_dim)


def _slice(
    q_THD: Tensor, k_cache_NPGD: Tensor, v_cache_NPGD: Tensor, layout: PagedLayout, sequence: int, scale: float
) -> Tensor:
    """The last T tokens of one sequence, against exactly its context."""
    num_queries, num_heads, _ = q_THD.shape
    num_keys = layout.context_lens[sequence]
    k_GKD = _keys_of(k_cache_NPGD, layout, sequence, num_keys)
    v_GKD = _keys_of(v_cache_NPGD, layout, sequence, num_keys)
    if num_queries == num_keys:
        mask_TK = None
    else:
        mask_TK = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q_THD.device)
        mask_TK = mask_TK.tril(diagonal=num_keys - num_queries)
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


def _row_by_row(q_THD: Tensor, k_cache_NPGD: Tensor, v_cache_NPGD: Tensor, layout: PagedLayout, scale: float) -> Tensor:
    """Every query alone, its keys padded to a length that its own position alone decides."""
    num_heads, head_dim = q_THD.shape[1:]
    num_kv_heads = k_cache_NPGD.shape[2]
    rows = []
    token = 0
    for sequence, (query_len, context_len) in enumerate(zip(layout.query_lens, layout.context_lens, strict=True)):
        for num_keys in range(context_len - query_len + 1, context_len + 1):
            padding = -num_keys % INVARIANT_KEYS
            k_GKD = F.pad(_keys_of(k_cache_NPGD, layout, sequence, num_keys), (0, 0, 0, padding))
            v_GKD = F.pad(_keys_of(v_cache_NPGD, layout, sequence, num_keys), (0, 0, 0, padding))
            mask_K = torch.arange(num_keys + padding, device=q_THD.device) < num_keys
            q_GRD = q_THD[token].view(num_kv_heads, num_heads // num_kv_heads, head_dim)
            out_GRD = F.scaled_dot_product_attention(q_GRD, k_GKD, v_GKD, attn_mask=mask_K, scale=scale)
            rows.append(out_GRD.reshape(num_heads, head_dim))
            token += 1
    return torch.stack(rows)


def _keys_of(cache_NPGD: Tensor, layout: PagedLayout, sequence: int, num_keys: int) -> Tensor:
    """The first ``num_keys`` cached keys (or values) of a sequence, as [G, K, D]."""
    num_blocks = -(-num_keys // layout.block_size)
    rows_KGD = cache_NPGD[layout.block_table_BN[sequence, :num_blocks]].flatten(0, 1)[:num_keys]
    return rows_KGD.transpose(0, 1)
