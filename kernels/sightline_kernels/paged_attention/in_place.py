"""Attention of single rows over the paged cache without copying it: how a CPU likes its decoding.

A gather writes every key and value out again, several times what the attention itself reads. Here the scores are
``sampled_addmm`` (dot products at chosen places, the cache's rows) and the sums ``embedding_bag`` (weighted rows of a
table, the cache again), both of which read rows where they lie. Suffixes as in ``layout.py``; Q rows, K keys a row
(padded), Y = Q * H, X = Y * K.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sightline_kernels.layout import PagedLayout
from sightline_kernels.paged_attention.places import as_table, locate, sum_rows


def can_attend_in_place(q_THD: Tensor) -> bool:
    """Torch has both operations for float32 on a CPU; elsewhere a gather is as good or all there is."""
    return q_THD.is_cpu and q_THD.dtype == torch.float32


@dataclass(frozen=True)
class RowKeys:
    """Where the keys of some query rows lie in the cache ``as_table``, [N * G * P, D]."""

    num_keys: int
    table_rows_X: Tensor
    """int32 [Q * H * K]: a table row for each key; past a query's context, the row of its last key again."""
    starts_Y: Tensor
    """int32 [Q * H]: where the table rows of each begin."""
    pattern: Tensor
    """Sparse CSR [Q * H, N * G * P] over the same places, holding 0, or -inf past the context."""


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
    places = locate(layout, sequences, context_lens, num_keys)
    mask_QK = np.where(places.past_QK, np.float32(-np.inf), np.float32(0))
    starts_Y1 = torch.arange(num_rows * num_heads + 1, dtype=torch.int32).mul_(num_keys)
    table_rows_X = places.table_rows(num_heads, num_kv_heads, block_size)
    with warnings.catch_warnings():
        # Torch calls its CSR tensors beta and, before 2.15, not checking them a risk, once a process.
        warnings.filterwarnings("ignore", "Sparse (CSR tensor support|invariant checks)")
        pattern = torch.sparse_csr_tensor(
            starts_Y1,
            table_rows_X,
            torch.from_numpy(mask_QK.repeat(num_heads, axis=0).reshape(-1)),
            size=(num_rows * num_heads, num_blocks * block_size * num_kv_heads),
            check_invariants=False,
        )
    return RowKeys(num_keys, table_rows_X, starts_Y1[:-1], pattern)


def attend_in_place(q_QHD: Tensor, k_cache_NPGD: Tensor, v_cache_NPGD: Tensor, keys: RowKeys, scale: float) -> Tensor:
    """Return out_QHD. Each row's arithmetic depends on its own query, keys and ``keys.num_keys`` alone."""
    num_rows, num_heads, head_dim = q_QHD.shape
    q_YD = q_QHD.reshape(-1, head_dim)
    scored = torch.sparse.sampled_addmm(keys.pattern, q_YD, as_table(k_cache_NPGD).t(), alpha=scale)
    weights_YK = scored.values().view(-1, keys.num_keys).softmax(dim=-1)
    out_YD = sum_rows(as_table(v_cache_NPGD), keys.table_rows_X, keys.starts_Y, weights_YK.view(-1))
    return out_YD.view(num_rows, num_heads, head_dim)
