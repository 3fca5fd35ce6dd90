"""Paged attention against a loop over rows in float64, over caches where all that isn't a sequence's own is NaN."""

import math
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from sightline_kernels.layout import PagedLayout
from sightline_kernels.paged_attention import reference
from sightline_kernels.paged_attention.reference import paged_attention
from sightline_kernels.store_kv.reference import store_kv

HEAD_DIM = 8
SCALE = 1 / math.sqrt(HEAD_DIM)


@dataclass(frozen=True)
class Step:
    """Queries of one step and the cache they look at, with each sequence's keys and values apart as well."""

    q_THD: Tensor
    k_cache_NPGD: Tensor
    v_cache_NPGD: Tensor
    layout: PagedLayout
    keys: list[Tensor]
    values: list[Tensor]

    def attend(self) -> Tensor:
        return paged_attention(self.q_THD, self.k_cache_NPGD, self.v_cache_NPGD, self.layout, SCALE)

    def expected(self) -> Tensor:
        num_heads, num_kv_heads = self.q_THD.shape[1], self.k_cache_NPGD.shape[2]
        rows = []
        for k_KGD, v_KGD, queries in zip(self.keys, self.values, self.layout.query_lens, strict=True):
            for seen in range(len(k_KGD) - queries + 1, len(k_KGD) + 1):
                q_HD = self.q_THD[len(rows)].double()
                for_each = torch.arange(num_heads) // (num_heads // num_kv_heads)
                k_KHD, v_KHD = k_KGD[:seen, for_each].double(), v_KGD[:seen, for_each].double()
                weights_KH = (torch.einsum("hd,khd->kh", q_HD, k_KHD) * SCALE).softmax(0)
                rows.append(torch.einsum("kh,khd->hd", weights_KH, v_KHD))
        return torch.stack(rows).to(self.q_THD.dtype)


def make_step(
    lengths: list[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    spare_blocks: int = 3,
    seed: int = 0,
) -> Step:
    """A step of (queries, context) lengths, decodes first; blocks are shuffled, the rest of the cache is NaN."""
    generator = torch.Generator().manual_seed(seed)

    def noise(*size: int) -> Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    needed = [-(-context // block_size) for _, context in lengths]
    num_blocks = sum(needed) + spare_blocks
    shuffled = torch.randperm(num_blocks, generator=generator)
    table = torch.zeros(len(lengths), max(needed), dtype=torch.int32)
    k_cache = torch.full((num_blocks, block_size, kv_heads, HEAD_DIM), float("nan"), dtype=dtype)
    v_cache = k_cache.clone()
    keys, values, slots = [], [], []
    for row, (queries, context) in enumerate(lengths):
        blocks = shuffled[sum(needed[:row]) : sum(needed[: row + 1])]
        table[row, : len(blocks)] = blocks
        positions = torch.arange(context)
        own = blocks[positions // block_size] * block_size + positions % block_size
        keys.append(noise(context, kv_heads, HEAD_DIM))
        values.append(noise(context, kv_heads, HEAD_DIM))
        store_kv(keys[-1], values[-1], k_cache, v_cache, own)
        slots.append(own[context - queries :])
    query_lens = tuple(queries for queries, _ in lengths)
    context_lens = tuple(context for _, context in lengths)
    layout = PagedLayout(
        block_table_BN=table,
        cu_seqlens_B1=torch.tensor([0, *query_lens]).cumsum(0).int(),
        context_len_B=torch.tensor(context_lens, dtype=torch.int32),
        slots_T=torch.cat(slots),
        query_lens=query_lens,
        context_lens=context_lens,
        num_decodes=sum(queries == 1 for queries in query_lens),
        block_size=block_size,
    )
    return Step(noise(sum(query_lens), heads, HEAD_DIM), k_cache, v_cache, layout, keys, values)


def heads_apart(step: Step) -> Step:
    """The same step over a cache that lies as a CPU's does."""
    caches = (step.k_cache_NPGD, step.v_cache_NPGD)
    k_cache, v_cache = (cache.transpose(1, 2).contiguous().transpose(1, 2) for cache in caches)
    return replace(step, k_cache_NPGD=k_cache, v_cache_NPGD=v_cache)


STEPS = {
    "one token": [(1, 1)],
    "decodes of many lengths": [(1, 7), (1, 1), (1, 4), (1, 19)],
    "a whole prompt": [(9, 9)],
    "a later chunk": [(5, 14)],
    "everything at once": [(1, 3), (1, 12), (6, 6), (2, 11), (7, 8)],
    "several invariant lengths": [(1, 300), (1, 5), (3, 257)],
}


@pytest.mark.parametrize("invariant", [False, True], ids=["", "row-invariant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("lengths", STEPS.values(), ids=STEPS.keys())
def test_equals_a_loop_over_rows(
    lengths: list[tuple[int, int]], heads: int, kv_heads: int, dtype: torch.dtype, invariant: bool
) -> None:
    step = make_step(lengths, heads=heads, kv_heads=kv_heads, dtype=dtype)
    step = replace(step, layout=replace(step.layout, row_invariant=invariant))
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(step.attend(), step.expected(), rtol=tolerance, atol=tolerance)
    # However the cache lies.
    assert torch.equal(heads_apart(step).attend(), step.attend())


@pytest.mark.parametrize("block_size", [1, 3, 16, 64])
def test_any_block_size(block_size: int) -> None:
    step = make_step(STEPS["everything at once"], block_size=block_size)
    torch.testing.assert_close(step.attend(), step.expected(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("gathered_bytes", [1, 6000])
def test_rows_gathered_a_few_at_a_time(gathered_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "GATHERED_BYTES", gathered_bytes)
    step = make_step(STEPS["decodes of many lengths"], dtype=torch.float64)
    torch.testing.assert_close(step.attend(), step.expected(), rtol=1e-5, atol=1e-5)


def test_a_second_layer_of_the_same_step_reads_its_own_cache() -> None:
    step = make_step(STEPS["everything at once"])
    step.attend()
    second = replace(
        step,
        v_cache_NPGD=step.v_cache_NPGD * 2,
        values=[values * 2 for values in step.values],
    )
    torch.testing.assert_close(second.attend(), second.expected(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_row_invariant_bytes_ignore_the_rest_of_the_step(dtype: torch.dtype) -> None:
    full = make_step([(1, 5), (1, 290), (1, 40), (9, 30)], dtype=dtype)
    together = replace(full, layout=replace(full.layout, row_invariant=True)).attend()
    layout = full.layout
    alone = PagedLayout(
        block_table_BN=layout.block_table_BN[2:3, :10],
        cu_seqlens_B1=torch.tensor([0, 1], dtype=torch.int32),
        context_len_B=layout.context_len_B[2:3],
        slots_T=layout.slots_T[2:3],
        query_lens=(1,),
        context_lens=(40,),
        num_decodes=1,
        block_size=layout.block_size,
        row_invariant=True,
    )
    by_itself = paged_attention(full.q_THD[2:3], full.k_cache_NPGD, full.v_cache_NPGD, alone, SCALE)
    assert torch.equal(by_itself[0], together[2])
