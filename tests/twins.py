"""Inputs for the fused twins, as a model gives them: queries, keys and values are views of one matrix.

Knows shapes and seeds. Knows nothing of what is done with them.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


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
