"""Inputs for the fused twins, as a model gives them: queries, keys and values are views of one matrix.

Knows shapes and seeds. Knows nothing of what is done with them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sightline_kernels.layout import PagedLayout


def noise(*size: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(size))
    return torch.randn(size, generator=generator).to(device, dtype)


def wide_rows(rows: int, width: int, *, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    """Rows that stand apart in memory: the first columns of a wider matrix."""
    return noise(rows, width + 16, dtype=dtype, device=device, seed=seed)[:, :width]


@dataclass(frozen=True)
class Heads:
    """One step's queries, keys and values with their angles, a cache full of NaN, and where each token goes."""

    q_THD: Tensor
    k_TGD: Tensor
    v_TGD: Tensor
    cos_TD: Tensor
    sin_TD: Tensor
    k_cache_NPGD: Tensor
    v_cache_NPGD: Tensor
    slots_T: Tensor

    def fresh_caches(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """Copies of the caches, in ``dtype`` if one is given."""
        dtype = dtype or self.k_cache_NPGD.dtype
        return self.k_cache_NPGD.to(dtype, copy=True), self.v_cache_NPGD.to(dtype, copy=True)


def make_heads(
    tokens: int, heads: int, kv_heads: int, head_dim: int, *, dtype: torch.dtype, device: str, seed: int = 0
) -> Heads:
    fused_TXD = noise(tokens, heads + 2 * kv_heads, head_dim, dtype=dtype, device=device, seed=seed)
    q_THD, k_TGD, v_TGD = fused_TXD.split((heads, kv_heads, kv_heads), dim=1)
    angles_TR = noise(tokens, head_dim // 2, dtype=torch.float32, device="cpu", seed=seed + 1)
    block_size, num_blocks = 3, -(-tokens // 3) + 2
    cache = torch.full((num_blocks, block_size, kv_heads, head_dim), float("nan"), dtype=dtype, device=device)
    order = torch.randperm(num_blocks * block_size, generator=torch.Generator().manual_seed(seed))
    return Heads(
        q_THD,
        k_TGD,
        v_TGD,
        torch.cat((angles_TR.cos(), angles_TR.cos()), dim=1).to(device, dtype),
        torch.cat((-angles_TR.sin(), angles_TR.sin()), dim=1).to(device, dtype),
        cache,
        cache.clone(),
        order[:tokens].to(device),
    )


@dataclass(frozen=True)
class Attention:
    """Queries of one step and a cache where all that isn't a sequence's own is NaN."""

    q_THD: Tensor
    k_cache_NPGD: Tensor
    v_cache_NPGD: Tensor
    layout: PagedLayout
    scale: float


def make_attention(
    lengths: list[tuple[int, int]],
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    device: str,
    block_size: int = 4,
) -> Attention:
    """A step of (queries, context) lengths, decodes first, over shuffled blocks."""
    needed = [-(-context // block_size) for _, context in lengths]
    num_blocks = sum(needed) + 2
    shuffled = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(num_blocks))
    table = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
    caches = [torch.full((num_blocks, block_size, kv_heads, head_dim), float("nan")) for _ in "kv"]
    slots = []
    for row, (queries, context) in enumerate(lengths):
        blocks = shuffled[sum(needed[:row]) : sum(needed[: row + 1])]
        table[row, : len(blocks)] = blocks
        positions = torch.arange(context)
        own = blocks[positions // block_size] * block_size + positions % block_size
        for seed, cache in enumerate(caches):
            rows = noise(context, kv_heads, head_dim, dtype=torch.float32, device="cpu", seed=10 * row + seed)
            cache.view(-1, kv_heads, head_dim)[own] = rows
        slots.append(own[context - queries :])
    query_lens, context_lens = zip(*lengths, strict=True)
    layout = PagedLayout(
        block_table_BN=table.to(device),
        cu_seqlens_B1=torch.tensor([0, *query_lens]).cumsum(0).int().to(device),
        context_len_B=torch.tensor(context_lens, dtype=torch.int32).to(device),
        slots_T=torch.cat(slots).to(device),
        query_lens=query_lens,
        context_lens=context_lens,
        num_decodes=sum(queries == 1 for queries in query_lens),
        block_size=block_size,
    )
    q_THD = noise(sum(query_lens), heads, head_dim, dtype=dtype, device=device)
    return Attention(q_THD, caches[0].to(device, dtype), caches[1].to(device, dtype), layout, head_dim**-0.5)
