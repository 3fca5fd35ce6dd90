"""The fused sampler against its reference: compiled on a GPU, else interpreted.

As `test_twins.py`: without a GPU it runs through `test_interpreted.py`. Both draw with the same noise, so that equal
tokens are asked for, but for a token that stands at a filter's bound within rounding.
"""

import os
from dataclasses import dataclass, fields, replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from sightline_kernels.sample import fused
from sightline_kernels.sample.reference import gumbel_noise, sample

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICES = ["cpu"] if INTERPRETED else [pytest.param("cuda", marks=pytest.mark.gpu)]
UNLUCKY = (1142540, 1369702, 2472697)
"""Seeds whose bits at the places 5, 6 and 4 are the largest."""

pytestmark = [
    pytest.mark.parametrize("device", DEVICES),
    # Interpreted, the logarithm of no probability says so.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]


@dataclass(frozen=True)
class Rows:
    """What is sampled from, in the order of the operation's arguments."""

    logits_BV: Tensor
    temperature_B: Tensor
    top_k_B: Tensor
    top_p_B: Tensor
    min_p_B: Tensor
    seed_B: Tensor
    choice_B: Tensor
    position_B: Tensor

    @property
    def arguments(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, field.name) for field in fields(self))


def make_rows(logits_BV: Tensor, device: str, **wanted: Any) -> Rows:
    """Rows of temperature 1 and no filter, each with its own seed, but for what is given."""
    rows = len(logits_BV)
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    plain |= {"seed": torch.arange(rows) * 2**57 - 3, "choice": 0, "position": 2**32 - 1}
    kinds = [torch.float32, torch.int64, torch.float32, torch.float32, *[torch.int64] * 3]
    assert wanted.keys() <= plain.keys(), wanted.keys()
    numbers = [
        torch.as_tensor(each, dtype=kind).expand(rows).contiguous().to(device)
        for each, kind in zip((plain | wanted).values(), kinds, strict=True)
    ]
    return Rows(logits_BV.to(device), *numbers)


def mixed_rows(vocab: int, device: str) -> Rows:
    """Greedy, plain and filtered rows in one batch, among them each filter at its ends."""
    generator = torch.Generator().manual_seed(vocab)
    filters = [
        # temperature, top_k, top_p, min_p
        (0.0, 0, 1.0, 0.0),
        (0.7, 0, 1.0, 0.0),
        (0.7, 0, 0.9, 0.0),
        (1.3, 50, 1.0, 0.0),
        (0.7, 50, 0.9, 0.0),
        (1.0, 0, 1.0, 0.1),
        (2.0, 7, 0.8, 0.02),
        (0.0, 5, 0.5, 0.5),
        (1.0, 1, 1.0, 0.0),
        (1.0, 0, 0.0, 0.0),
        (1.0, 0, 1.0, 1.0),
        (1.0, 0, 1.0, 2.0),
        (1.0, vocab + 3, 0.99, 0.0),
        (0.05, vocab - 1, 0.999, 0.0),
    ]
    logits = torch.randn(len(filters), vocab, generator=generator) * 4
    logits[::2] = logits[::2].bfloat16().float()
    logits[1::3, : vocab // 2] = -torch.inf
    temperature, top_k, top_p, min_p = zip(*filters, strict=True)
    rows = make_rows(logits, device, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    index_B = torch.arange(len(filters), device=device)
    return replace(rows, choice_B=index_B % 3, position_B=index_B * 1000)


def check(rows: Rows) -> Tensor:
    """The twin's tokens, which are the reference's, or would be were the filters' bounds moved by a rounding."""
    before = [each.clone() for each in rows.arguments]
    tokens = fused.sample(*rows.arguments)
    assert (tokens.dtype, tokens.shape) == (torch.int64, rows.seed_B.shape)
    assert all(torch.equal(old, new) for old, new in zip(before, rows.arguments, strict=True))
    expected = sample(*rows.arguments)
    equal = tokens == expected
    for step in (-1e-5, 1e-5):
        moved = replace(rows, top_p_B=rows.top_p_B + step * (rows.top_p_B < 1), min_p_B=rows.min_p_B * (1 + step))
        equal |= tokens == sample(*moved.arguments)
    assert equal.all(), f"{tokens.tolist()} were drawn, {expected.tolist()} by the reference"
    return tokens


@pytest.mark.parametrize("vocab", [1, 2, 63, 64, 65, 1000, 1024, fused.BLOCK + 65])
def test_rows_of_every_kind(vocab: int, device: str) -> None:
    check(mixed_rows(vocab, device))


@pytest.mark.skipif(INTERPRETED, reason="takes minutes")
@pytest.mark.parametrize("vocab", [32003, 32064, 151936])
def test_true_vocabularies(vocab: int, device: str) -> None:
    for seed in range(8):
        rows = mixed_rows(vocab, device)
        check(replace(rows, seed_B=rows.seed_B + seed))


def test_a_true_vocabulary(device: str) -> None:
    logits = torch.randn(1, 32064, generator=torch.Generator().manual_seed(4)) * 3
    check(make_rows(logits, device, temperature=0.7, top_k=50, top_p=0.9))


@pytest.mark.parametrize("filters", [{}, {"top_k": 3}, {"top_p": 0.6}, {"min_p": 0.3}], ids=str)
def test_all_logits_equal(filters: dict[str, float], device: str) -> None:
    """Equals stay together: no filter drops any."""
    tokens = check(make_rows(torch.full((8, 130), 2.5), device, **filters))
    assert len(set(tokens.tolist())) > 4


@pytest.mark.parametrize("filters", [{"top_k": 2}, {"top_p": 0.03}, {"min_p": 0.9}], ids=str)
def test_equals_at_a_bound_stay_together(filters: dict[str, float], device: str) -> None:
    logits = torch.full((24, 70), -3.0)
    logits[:, 9], logits[:, [3, 40, 65]] = 1.1, 1.0
    # So hot that all would be drawn: the likeliest has a share of 0.021, the rest hardly less each.
    tokens = check(make_rows(logits, device, temperature=10.0, **filters))
    assert set(tokens.tolist()) == {3, 9, 40, 65}


@pytest.mark.parametrize("top_k", [1, 2, 3, 4])
def test_neighbouring_numbers_are_told_apart(top_k: int, device: str) -> None:
    tiny = torch.tensor(torch.finfo(torch.float32).smallest_normal)
    for middle, zero in ((tiny, -0.0), (torch.tensor(9.0), 5.0)):
        next_one = middle.nextafter(torch.tensor(torch.inf))
        last = next_one.nextafter(torch.tensor(torch.inf))
        logits = torch.stack((torch.tensor(zero), middle, torch.tensor(abs(zero)), -middle, next_one, last))
        tokens = check(make_rows(logits.expand(16, -1), device, temperature=100.0, top_k=top_k))
        assert set(tokens.tolist()) == ({5}, {4, 5}, {1, 4, 5}, {0, 1, 2, 4, 5})[top_k - 1]


def test_neighbours_below_a_gap_are_told_apart(device: str) -> None:
    logits = torch.tensor([1.0, 61.0, 60.0, 1 + 2.0**-23]).expand(16, -1)
    assert set(check(make_rows(logits, device, temperature=100.0, top_k=3)).tolist()) == {1, 2, 3}


def test_forbidden_tokens_are_never_drawn(device: str) -> None:
    logits = torch.full((6, 200), -torch.inf)
    logits[:, 150] = torch.tensor([-80.0, 0.0, 1e30, -1e30, 3.0, 5.0])
    filters = {"top_k": [0, 3, 0, 0, 150, 0], "top_p": [1, 1, 0.5, 1, 0.9, 1], "min_p": [0, 0, 0, 0.5, 0.1, 0]}
    tokens = check(make_rows(logits, device, temperature=[1, 0.5, 1, 1, 0.7, 0], **filters))
    assert tokens.tolist() == [150] * 6


@pytest.mark.parametrize("vocab", [70, fused.BLOCK + 65])
def test_a_row_of_forbidden_tokens_gives_the_first(vocab: int, device: str) -> None:
    filters = {"top_k": [0, 3, 0, 0], "top_p": [1.0, 1.0, 0.5, 1.0], "min_p": 0.2}
    rows = make_rows(torch.full((4, vocab), -torch.inf), device, temperature=[1.0, 1.0, 1.0, 0.0], **filters)
    assert check(rows).tolist() == [0, 0, 0, 0]


def test_logits_that_are_no_numbers_give_a_token_all_the_same(device: str) -> None:
    logits = torch.randn(6, 70, generator=torch.Generator().manual_seed(0))
    logits[:3] = torch.nan
    logits[3:, 5] = torch.nan
    rows = make_rows(logits, device, temperature=[0.0, 1.0, 1.0] * 2, top_k=[0, 0, 5] * 2, top_p=[1, 1, 0.5] * 2)
    tokens = fused.sample(*rows.arguments)
    assert ((tokens >= 0) & (tokens < 70)).all()


def test_greedy_is_the_first_of_the_likeliest(device: str) -> None:
    logits = torch.zeros(3, fused.BLOCK + 300)
    logits[1, [fused.BLOCK + 7, fused.BLOCK + 200]] = 2.0
    logits[2, [70, fused.BLOCK + 7]] = 2.0
    assert check(make_rows(logits, device, temperature=0.0)).tolist() == [0, fused.BLOCK + 7, 70]


def test_a_rows_token_is_its_own_business(device: str) -> None:
    rows = mixed_rows(300, device)
    together = check(rows)
    for row in (2, 4, 6):
        alone = Rows(*(each[row : row + 1].clone() for each in rows.arguments))
        assert torch.equal(fused.sample(*alone.arguments), together[row : row + 1])


def test_rows_that_stand_apart_and_no_rows(device: str) -> None:
    rows = mixed_rows(65, device)
    wide = torch.cat((rows.logits_BV, torch.full_like(rows.logits_BV, 99.0)), dim=1)[:, :65]
    assert torch.equal(check(replace(rows, logits_BV=wide)), check(rows))
    none = Rows(*(each[:0] for each in rows.arguments))
    assert fused.sample(*none.arguments).shape == (0,)


def test_a_host_that_knows_of_no_filter_changes_nothing(device: str) -> None:
    rows = make_rows(torch.randn(4, 90, generator=torch.Generator().manual_seed(2)), device)
    assert torch.equal(fused.sample(*rows.arguments, filtered=False), check(rows))


@triton.jit
def _store_noise(out_ptr: "Any", seed_ptr: "Any", choice: "Any", position: "Any", PLACES: tl.constexpr) -> None:
    row, places = tl.program_id(0), tl.arange(0, PLACES)
    tl.store(out_ptr + row * PLACES + places, fused._gumbel(places, tl.load(seed_ptr + row), choice, position))


def test_noise_is_the_references(device: str) -> None:
    seeds = torch.tensor([*UNLUCKY, 0, -1, 2**63 - 1, -(2**63)], device=device)
    for choice, position in ((0, 0), (3, 2**32 - 1)):
        ours = torch.empty(len(seeds), 1024, device=device)
        _store_noise[(len(seeds),)](ours, seeds, choice, position, PLACES=1024)
        others = (torch.full_like(seeds, number) for number in (choice, position))
        torch.testing.assert_close(ours, gumbel_noise(seeds, *others, 1024), rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(INTERPRETED, reason="an interpreter has no graphs")
def test_sampling_is_captured_and_replayed_with_other_wishes(device: str) -> None:
    rows, other = mixed_rows(1000, device), mixed_rows(1000, device)
    fused.sample(*rows.arguments)
    sample(*rows.arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = fused.sample(*rows.arguments)
        reference = sample(*rows.arguments)
    for shift in (0, 5):
        for ours, theirs in zip(rows.arguments, other.arguments, strict=True):
            ours.copy_(theirs.roll(shift, 0))
        graph.replay()
        assert torch.equal(tokens, check(rows))
        assert torch.equal(reference, sample(*rows.arguments))
