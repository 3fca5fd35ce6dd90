"""Attention of single rows in low precision on a CPU: keys gathered by whole blocks, values summed where they lie.

Torch's sparse products know no bfloat16 on a CPU, and its attention is slow there for one query. A matrix product is
not: all of a row's heads are multiplied at once with its gathered keys, each head's query set out in its own columns
and zero elsewhere. Suffixes as in ``layout.py``; K keys a row (padded to whole blocks), C columns = G * D.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline_kernels.layout import PagedLayout

MOST_KV_HEADS = 8
"""The zeros are multiplied too: beyond this many key heads they cost more than the gather saves."""


def can_attend_by_blocks(q_BHD: Tensor, num_kv_heads: int) -> bool:
    return q_BHD.is_cpu and q_BHD.dtype == torch.bfloat16 and num_kv_heads <= MOST_KV_HEADS


@dataclass(frozen=True)
class BlockKeys:
    """Where the keys of the decode rows lie."""

    blocks_X: Tensor
    """int64 [B * blocks a row]: the rows' blocks, one row after another."""
    table_rows_XK: Tensor
    """int32 [B * H, K] into the cache seen as [N * P * G, D]; past a row's context, the row of its last key again."""
    past_B1K: Tensor
    """Whether a key lies past the row's context."""
    own_HG1: Tensor
    """Whether a query head attends to a key head."""


def locate_blocks(layout: PagedLayout, num_heads: int, cache_NPGD: Tensor) -> BlockKeys:
    """Lay out the decode rows of a step."""
    _, block_size, num_kv_heads, _ = cache_NPGD.shape
    num_rows = layout.num_decodes
    width = -(-max(layout.context_lens[:num_rows]) // block_size)
    blocks_BN = layout.block_table_BN[:num_rows, :width].long()
    context_B1 = torch.tensor(layout.context_lens[:num_rows]).unsqueeze(1)
    positions_K = torch.arange(width * block_size)
    # Past its context a row sums its own last token with weight 0: whatever others left there, even NaN, stays out.
    seen_BK = torch.minimum(positions_K, context_B1 - 1)
    slots_BK = blocks_BN.gather(1, seen_BK // block_size) * block_size + seen_BK % block_size
    heads_H = torch.arange(num_heads) // (num_heads // num_kv_heads)
    table_rows_BHK = slots_BK.unsqueeze(1) * num_kv_heads + heads_H.unsqueeze(1)
    past_B1K = (positions_K >= context_B1).unsqueeze(1)
    own_HG1 = (heads_H.unsqueeze(1) == torch.arange(num_kv_heads)).unsqueeze(2)
    return BlockKeys(blocks_BN.flatten(), table_rows_BHK.flatten(0, 1).int(), past_B1K, own_HG1)


def attend_by_blocks(
    q_BHD: Tensor, k_cache_NPGD: Tensor, v_cache_NPGD: Tensor, keys: BlockKeys, scale: float
) -> Tensor:
    """Return out_BHD. Scores are rounded to the cache's dtype, weights are computed in float32."""
    num_rows, num_heads, head_dim = q_BHD.shape
    num_blocks, _, num_kv_heads, _ = k_cache_NPGD.shape
    columns = num_kv_heads * head_dim
    k_BKC = k_cache_NPGD.view(num_blocks, -1).index_select(0, keys.blocks_X).view(num_rows, -1, columns)
    q_BHC = torch.where(keys.own_HG1, q_BHD.unsqueeze(2), 0.0).flatten(2)
    scores_BHK = torch.bmm(q_BHC, k_BKC.transpose(1, 2)).float().mul_(scale)
    weights_BHK = scores_BHK.masked_fill_(keys.past_B1K, -torch.inf).softmax(dim=-1).to(q_BHD.dtype)
    out_XD = F.embedding_bag(
        keys.table_rows_XK, v_cache_NPGD.view(-1, head_dim), per_sample_weights=weights_BHK.flatten(0, 1), mode="sum"
    )
    return out_XD.view(num_rows, num_heads, head_dim)
