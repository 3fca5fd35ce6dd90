"""Attention of single rows in low precision on a CPU: keys gathered by whole blocks, values summed where they lie.

Torch's sparse products know no bfloat16 on a CPU, and its attention is slow there for one query. Matrix products are
not, of a row's gathered keys of a head with the queries that share them.
Suffixes as in ``layout.py``; R query heads that share a key head, K keys a row (padded to whole blocks).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sightline_kernels.layout import PagedLayout
from sightline_kernels.paged_attention.places import as_table, blocks_of_heads, locate, sum_rows


def can_attend_by_blocks(q_BHD: Tensor) -> bool:
    return q_BHD.is_cpu and q_BHD.dtype == torch.bfloat16


@dataclass(frozen=True)
class BlockKeys:
    """Where the keys of the decode rows lie."""

    blocks_X: Tensor
    """int32 [B * G * blocks a row] into ``blocks_of_heads``."""
    table_rows_X: Tensor
    """int32 [B * H * K] into the cache ``as_table``; past a row's context, the row of its last key again."""
    starts_Y: Tensor
    """int32 [B * H]: where the table rows of each begin."""
    past_B1K: Tensor
    """Whether a key lies past the row's context."""


def locate_blocks(layout: PagedLayout, num_heads: int, cache_NPGD: Tensor) -> BlockKeys:
    """Lay out the decode rows of a step."""
    _, block_size, num_kv_heads, _ = cache_NPGD.shape
    num_rows = layout.num_decodes
    width = -(-max(layout.context_lens[:num_rows]) // block_size)
    num_keys = width * block_size
    places = locate(layout, range(num_rows), layout.context_lens[:num_rows], num_keys)
    firsts_B1N = layout.block_table_BN[:num_rows, None, :width] * num_kv_heads
    return BlockKeys(
        (firsts_B1N + torch.arange(num_kv_heads, dtype=torch.int32)[:, None]).flatten(),
        places.table_rows(num_heads, num_kv_heads, block_size),
        torch.arange(num_rows * num_heads, dtype=torch.int32).mul_(num_keys),
        torch.from_numpy(places.past_QK[:, None]),
    )


def attend_by_blocks(
    q_BHD: Tensor, k_cache_NPGD: Tensor, v_cache_NPGD: Tensor, keys: BlockKeys, scale: float
) -> Tensor:
    """Return out_BHD. Scores are rounded to the cache's dtype, weights are computed in float32."""
    num_rows, num_heads, head_dim = q_BHD.shape
    pairs = num_rows * k_cache_NPGD.shape[2]
    k_XKD = blocks_of_heads(k_cache_NPGD).index_select(0, keys.blocks_X).view(pairs, -1, head_dim)
    scores_XRK = torch.bmm(q_BHD.reshape(pairs, -1, head_dim), k_XKD.transpose(1, 2))
    scores_BHK = scores_XRK.view(num_rows, num_heads, -1).float().mul_(scale)
    weights_BHK = scores_BHK.masked_fill_(keys.past_B1K, -torch.inf).softmax(dim=-1).to(q_BHD.dtype)
    out_YD = sum_rows(as_table(v_cache_NPGD), keys.table_rows_X, keys.starts_Y, weights_BHK.view(-1))
    return out_YD.view(num_rows, num_heads, head_dim)
