"""Attention of single rows over the paged cache without copying it: how a CPU likes its decoding.

A gather writes every key and value out again, several times what the attention itself reads. Here the scores are
``sampled_addmm`` (dot products at chosen places, the cache's rows) and the sums ``embedding_bag`` (weighted rows of a
table, the cache again), both of which read rows where they lie. Suffixes as in ``layout.py``; Q rows, K keys a row
(padded), X = Q * H * K.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline_kernels.layout import PagedLayout


def can_attend_in_place(q_THD: Tensor) -> bool:
    """Torch has both operations for float32 on a CPU; elsewhere a gather is as good or all there is."""
    return q_THD.is_cpu and q_THD.dtype == torch.float32


@dataclass(frozen=True)
class RowKeys:
    """Where the keys of some query rows lie in the cache seen as a table of [N * P * G, D]."""

    num_keys: int
    table_rows_XK: Tensor
    """int32 [Q * H, K]: a table row for each key; past a query's context, the row of its last key again."""
    pattern: Tensor
    """Sparse CSR [Q * H, N * P * G] over the same places, holding 0, or -inf past the context."""


def locate_keys(
    layout: PagedLayout,
    sequences: Sequence[int],
    context_lens: Sequence[int],
    num_keys: int,
    num_heads: int,
    cache_NPGD: Tensor,
) -> RowKeys:
    """Lay out queries of which row ``q`` sees the first ``context_lens[q]`` tokens of ``sequences[q]``."""
    num_blocks, block_size, num_kv_heads, _ = cache_NPGD.shape
    num_rows = len(sequences)
    context_Q1 = torch.tensor(context_lens).unsqueeze(1)
    positions_K = torch.arange(num_keys)
    # Past its context a row looks at its own last token again: whatever others left in the block, even NaN, stays out.
    seen_QK = torch.minimum(positions_K, context_Q1 - 1)
    blocks_QK = layout.block_table_BN[list(sequences)].long().gather(1, seen_QK // block_size)
    slots_QK = blocks_QK * block_size + seen_QK % block_size
    heads_H = torch.arange(num_heads) // (num_heads // num_kv_heads)
    table_rows_XK = (slots_QK.unsqueeze(1) * num_kv_heads + heads_H.unsqueeze(1)).view(-1, num_keys).int()
    mask_QK = torch.zeros(num_rows, num_keys).masked_fill_(positions_K >= context_Q1, float("-inf"))
    mask_QHK = mask_QK.unsqueeze(1).expand(num_rows, num_heads, num_keys)
    with warnings.catch_warnings():
        # Torch calls its CSR tensors beta and, before 2.15, not checking them a risk, once a process.
        warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)")
        pattern = torch.sparse_csr_tensor(
            torch.arange(num_rows * num_heads + 1, dtype=torch.int32) * num_keys,
            table_rows_XK.flatten(),
            mask_QHK.reshape(-1),
            size=(num_rows * num_heads, num_blocks * block_size * num_kv_heads),
            check_invariants=False,
        )
    return RowKeys(num_keys, table_rows_XK, pattern)


def attend_in_place(q_QHD: Tensor, k_cache_NPGD: Tensor, v_cache_NPGD: Tensor, keys: RowKeys, scale: float) -> Tensor:
    """Return out_QHD. Each row's arithmetic depends on its own query, keys and ``keys.num_keys`` alone."""
    num_rows, num_heads, head_dim = q_QHD.shape
    q_XD = q_QHD.reshape(-1, head_dim)
    scored = torch.sparse.sampled_addmm(keys.pattern, q_XD, k_cache_NPGD.view(-1, head_dim).t(), alpha=scale)
    weights_XK = scored.values().view(-1, keys.num_keys).softmax(dim=-1)
    out_XD = F.embedding_bag(
        keys.table_rows_XK, v_cache_NPGD.view(-1, head_dim), per_sample_weights=weights_XK, mode="sum"
    )
    return out_XD.view(num_rows, num_heads, head_dim)
