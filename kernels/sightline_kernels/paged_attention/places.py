"""What both ways of decoding on a CPU share: where rows' keys lie in the cache, and sums of table rows.

Laid out once a step in NumPy, whose operations on so few numbers take a third of torch's time. Knows the layout's
geometry. Suffixes as in ``in_place.py``; N blocks a sequence, R table rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sightline_kernels.layout import PagedLayout


@dataclass(frozen=True)
class Places:
    slots_QK: np.ndarray[Any, np.dtype[np.int32]]
    """Where each key of a row lies; past the row's context, its last key again: whatever others left there, even NaN,
    stays out."""
    past_QK: np.ndarray[Any, np.dtype[np.bool_]]
    """Which are past the context."""

    def table_rows(self, num_heads: int, num_kv_heads: int, block_size: int) -> Tensor:
        """int32 [Q * H * K] into ``as_table``, for each query head its key head's rows."""
        heads_H1 = (np.arange(num_heads, dtype=np.int32) // (num_heads // num_kv_heads))[:, None]
        firsts_QK = self.slots_QK // block_size * np.int32(block_size * (num_kv_heads - 1))
        rows_QHK = (self.slots_QK + firsts_QK)[:, None] + heads_H1 * np.int32(block_size)
        return torch.from_numpy(rows_QHK.reshape(-1))


def locate(layout: PagedLayout, sequences: Sequence[int], context_lens: Sequence[int], num_keys: int) -> Places:
    """Of queries of which row ``q`` sees the first ``context_lens[q]`` tokens of ``sequences[q]``."""
    size = layout.block_size
    context_Q1 = np.array(context_lens)[:, None]
    first_QN1 = (layout.block_table_BN.numpy()[np.array(sequences)] * np.int32(size))[..., None]
    slots_QK = (first_QN1 + np.arange(size, dtype=np.int32)).reshape(len(sequences), -1)[:, :num_keys]
    if slots_QK.shape[1] < num_keys:
        slots_QK = np.pad(slots_QK, ((0, 0), (0, num_keys - slots_QK.shape[1])))
    past_QK = np.arange(num_keys) >= context_Q1
    if min(context_lens) < num_keys:
        slots_QK = np.where(past_QK, np.take_along_axis(slots_QK, context_Q1 - 1, 1), slots_QK)
    return Places(slots_QK, past_QK)


def as_table(cache_NPGD: Tensor) -> Tensor:
    """The cache as a table [N * G * P, D]: as it lies where heads are kept apart, else a copy."""
    return cache_NPGD.transpose(1, 2).reshape(-1, cache_NPGD.shape[3])


def blocks_of_heads(cache_NPGD: Tensor) -> Tensor:
    """The cache as a table [N * G, P * D] of what a block holds of a head, likewise."""
    num_blocks, block_size, num_kv_heads, head_dim = cache_NPGD.shape
    return cache_NPGD.transpose(1, 2).reshape(num_blocks * num_kv_heads, block_size * head_dim)


def sum_rows(table_RD: Tensor, rows_X: Tensor, starts_Y: Tensor, weights_X: Tensor) -> Tensor:
    """Return sums_YD: of the table's ``rows_X`` times ``weights_X``, those from each start to the next one."""
    # Without ``F.embedding_bag``'s checks, which take as long as short sums do.
    sums_YD: Tensor = torch.embedding_bag(table_RD, rows_X, starts_Y, False, 0, False, weights_X)[0]
    return sums_YD
