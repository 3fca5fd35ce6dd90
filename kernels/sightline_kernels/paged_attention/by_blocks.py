"""Attention of single rows in low precision on a CPU: keys gathered by whole blocks, values summed where they lie.

Torch's sparse products know no bfloat16 on a CPU, and its attention is slow there for one query. A matrix product is
not: all of a row's heads are multiplied at once with its gathered keys, each head's query set out in its own columns
and zero elsewhere. Suffixes as in ``layout.py``; K keys a row (padded to whole blocks), C columns = G * D.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sightline_kernels.layout import PagedLayout
from sightline_kernels.paged_attention.places import locate, sum_rows

MOST_KV_HEADS = 8
"""The zeros are multiplied too: beyond this many key heads they cost more than the gather saves."""


def can_attend_by_blocks(q_BHD: Tensor, num_kv_heads: int) -> bool:
    return q_BHD.is_cpu and q_BHD.dtype == torch.bfloat16 and num_kv_heads <= MOST_KV_HEADS


@dataclass(frozen=True)
class BlockKeys:
    """Where the keys of the decode rows lie."""

    blocks_X: Tensor
    """int32 [B * blocks a row]: the rows' blocks, one row after another."""
    table_rows_X: Tensor
    """int32 [B * H * K] into the cache seen as [N * P * G, D]; past a row's context, the row of its last key again."""
    starts_Y: Tensor
    """int32 [B * H]: where the table rows of each begin."""
    past_B1K: Tensor
    """Whether a key lies past the row's context."""
    own_HG1: Tensor
    """1 where a query head attends to a key head, else 0."""


def locate_blocks(layout: PagedLayout, num_heads: int, cache_NPGD: Tensor) -> BlockKeys:
    """Lay out the decode rows of a step."""
    _, block_size, num_kv_heads, _ = cache_NPGD.shape
    num_rows = layout.num_decodes
    width = -(-max(layout.context_lens[:num_rows]) // block_size)
    num_keys = width * block_size
    places = locate(layout, range(num_rows), layout.context_lens[:num_rows], num_keys)
    heads_H1 = torch.arange(num_heads).div(num_heads // num_kv_heads, rounding_mode="floor").unsqueeze(1)
    return BlockKeys(
        layout.block_table_BN[:num_rows, :width].flatten(),
        places.table_rows(num_heads, num_kv_heads),
        torch.arange(num_rows * num_heads, dtype=torch.int32).mul_(num_keys),
        torch.from_numpy(places.past_QK[:, None]),
        (heads_H1 == torch.arange(num_kv_heads)).unsqueeze(2).to(cache_NPGD.dtype),
    )


def attend_by_blocks(
    q_BHD: Tensor, k_cache_NPGD: Tensor, v_cache_NPGD: Tensor, keys: BlockKeys, scale: float
) -> Tensor:
    """Return out_BHD. Scores are rounded to the cache's dtype, weights are computed in float32."""
    num_rows, num_heads, head_dim = q_BHD.shape
    num_blocks, _, num_kv_heads, _ = k_cache_NPGD.shape
    columns = num_kv_heads * head_dim
    k_BKC = k_cache_NPGD.view(num_blocks, -1).index_select(0, keys.blocks_X).view(num_rows, -1, columns)
    q_BHC = (q_BHD.unsqueeze(2) * keys.own_HG1).flatten(2)
    scores_BHK = torch.bmm(q_BHC, k_BKC.transpose(1, 2)).float().mul_(scale)
    weights_BHK = scores_BHK.masked_fill_(keys.past_B1K, -torch.inf).softmax(dim=-1).to(q_BHD.dtype)
    out_YD = sum_rows(v_cache_NPGD.view(-1, head_dim), keys.table_rows_X, keys.starts_Y, weights_BHK.view(-1))
    return out_YD.view(num_rows, num_heads, head_dim)
