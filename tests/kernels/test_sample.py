"""The sampling kernel: published Philox vectors, the distribution drawn from, the filters' definitions."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sightline_kernels.sample import compilable
from sightline_kernels.sample.reference import GROUP, gumbel_noise, keep, philox, sample


def draw(logits: Tensor, **wanted: Any) -> Tensor:
    """``sample`` with what isn't given at its plainest: temperature 1, no filter, seed 0, first choice and position."""
    plain = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "choice": 0, "position": 0}
    filtered = wanted.pop("filtered", True)
    assert wanted.keys() <= plain.keys(), wanted.keys()
    kinds = [torch.float32 if isinstance(usual, float) else torch.int64 for usual in plain.values()]
    numbers = [
        torch.as_tensor(each, dtype=kind, device=logits.device).expand(len(logits)).contiguous()
        for each, kind in zip((plain | wanted).values(), kinds, strict=True)
    ]
    return sample(logits, *numbers, filtered=filtered)


def test_philox_gives_the_authors_known_answers() -> None:
    """Vectors of the Random123 distribution's known-answer tests for philox4x32, 10 rounds."""
    cases = [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    counters = torch.tensor([counter for counter, _, _ in cases]).T
    keys = torch.tensor([key for _, key, _ in cases]).T
    even, odd = philox(counters[0::2], counters[1::2], keys)
    assert torch.stack((even[0], odd[0], even[1], odd[1])).T.tolist() == [list(expected) for *_, expected in cases]


def test_noise_depends_on_seed_choice_position_and_token_alone() -> None:
    seeds, choices, positions = (
        torch.tensor([3, 3, 3, 4, -1]),
        torch.tensor([0, 0, 1, 0, 0]),
        torch.tensor([7, 8, 7, 7, 7]),
    )
    noise = gumbel_noise(seeds, choices, positions, 1001)
    assert noise.shape == (5, 1001)
    assert noise.isfinite().all()
    assert len({tuple(row.tolist()) for row in noise}) == 5
    alone = gumbel_noise(seeds[2:3], choices[2:3], positions[2:3], 1001)
    assert torch.equal(alone[0], noise[2])
    assert torch.equal(gumbel_noise(seeds, choices, positions, 500), noise[:, :500])


def test_noise_is_gumbel() -> None:
    noise = gumbel_noise(torch.arange(50), torch.zeros(50, dtype=torch.int64), torch.zeros(50, dtype=torch.int64), 4000)
    assert abs(float(noise.mean()) - 0.5772157) < 0.01
    assert abs(float(noise.var()) - 1.6449341) < 0.03


def test_noise_of_the_largest_bits_is_a_number_too() -> None:
    """Here float32 rounds the uniform number to a whole 1. Its logarithm's would put an allowed token level with the
    forbidden ones."""
    for seed, place in ((1142540, 5), (1369702, 6), (2472697, 4)):
        zero = torch.zeros(1, dtype=torch.int64)
        noise = float(gumbel_noise(torch.tensor([seed]), zero, zero, 8)[0, place])
        assert noise == pytest.approx(-math.log(24 * math.log(2)))
        # A vocabulary of one group: its noise is the first, its tokens' follow.
        logits = torch.full((1, 8), -torch.inf)
        logits[0, place - 1] = 2.0
        assert draw(logits, seed=seed).tolist() == [place - 1]
        assert draw(torch.zeros(1, 8).index_fill(1, torch.tensor(place - 1), 9.0), seed=seed, top_k=1) == place - 1


def test_draws_follow_the_softmax() -> None:
    rows = 20_000
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, -torch.inf]).expand(rows, -1)
    for temperature in (1.0, 0.5):
        share = torch.bincount(draw(logits, temperature=temperature, seed=torch.arange(rows)), minlength=5) / rows
        assert (share - (logits[0] / temperature).softmax(0)).abs().max() < 0.012
        assert share[4] == 0


def test_draws_follow_the_softmax_across_groups() -> None:
    rows, vocab = 60_000, 3 * GROUP + 7
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(3)) * 2
    logits[GROUP : GROUP + 40] = -torch.inf
    tokens = draw(logits.expand(rows, -1), seed=torch.arange(rows))
    share, expected = torch.bincount(tokens, minlength=vocab) / rows, logits.softmax(0)
    assert share.shape == (vocab,)
    assert not share[logits == -torch.inf].any()
    # Pearson's statistic has mean ``cells - 1`` and variance twice that; five deviations leave no doubt.
    cells = expected * rows > 5
    statistic = ((share - expected)[cells] ** 2 / expected[cells]).sum() * rows
    freedom = int(cells.sum())
    assert abs(float(statistic) - freedom) < 5 * (2 * freedom) ** 0.5


def test_a_seed_draws_what_it_always_drew() -> None:
    """Tokens of the first release: whoever kept a seed gets them again."""
    rows = torch.arange(12)
    logits = (torch.arange(700)[None] * (rows[:, None] + 1.0)).sin() * 5
    own = {"temperature": torch.tensor([0.3, 0.7, 1.0, 1.5]).repeat(3)}
    own |= {"seed": rows * 2**58 - 3, "choice": rows % 3, "position": rows * 100}
    plain = [341, 676, 346, 71, 366, 262, 476, 217, 433, 276, 633, 309]
    assert draw(logits, **own).tolist() == plain
    assert draw(logits, **own, filtered=False).tolist() == plain
    filters = {
        "top_k": [0, 0, 0, 0, 20, 20, 20, 0, 0, 0, 3, 9],
        "top_p": [0.9, 0.5, 0.2, 0.95, 1, 1, 0.8, 1, 1, 1, 1, 0.5],
        "min_p": [0, 0, 0, 0, 0, 0, 0, 0.1, 0.3, 0.02, 0, 0.1],
    }
    assert draw(logits, **own, **filters).tolist() == [341, 673, 344, 71, 366, 283, 458, 217, 433, 276, 356, 330]


def test_a_whole_group_may_be_forbidden() -> None:
    logits = torch.full((1, 2 * GROUP), -torch.inf)
    logits[0, GROUP + 3] = 1.0
    for filters in ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.5}):
        assert draw(logits, **filters).tolist() == [GROUP + 3]


def test_a_row_of_forbidden_tokens_gives_the_first() -> None:
    logits = torch.full((4, 70), -torch.inf)
    filters = {"top_k": [0, 3, 0, 0], "top_p": [1.0, 1.0, 0.5, 1.0], "min_p": 0.2}
    assert draw(logits, temperature=[1.0, 1.0, 1.0, 0.0], **filters).tolist() == [0, 0, 0, 0]


def test_temperature_zero_is_the_first_of_the_likeliest_beside_sampled_rows() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    logits[2, [7, 30, 31]] = 9.0
    before = logits.clone()
    tokens = draw(logits, temperature=[0.0, 1.0, 0.0, 1.0], seed=torch.arange(4), top_k=[0, 0, 2, 2])
    assert tokens[0] == logits[0].argmax()
    alone = [draw(logits[row : row + 1], seed=row, top_k=top_k).item() for row, top_k in ((1, 0), (3, 2))]
    assert tokens[[1, 3]].tolist() == alone
    assert logits.argmax(dim=1)[[1, 3]].tolist() != alone
    assert tokens[2] == 7
    assert draw(logits, temperature=0.0).tolist() == [*logits[:2].argmax(1).tolist(), 7, int(logits[3].argmax())]
    assert torch.equal(logits, before), "the caller's logits were changed"


def kept(logits: list[float], *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[int]:
    filters = (torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p]))
    return torch.nonzero(keep(torch.tensor([logits]), torch.ones(1, 1), *filters)[0])[:, 0].tolist()


def test_filters_keep_what_their_definitions_say() -> None:
    half, quarter, eighth = [float(torch.tensor(p).log()) for p in (0.5, 0.25, 0.125)]
    logits = [eighth, half, quarter, eighth]
    assert kept(logits) == [0, 1, 2, 3]
    assert kept(logits, top_k=2) == [1, 2]
    assert kept(logits, top_k=9) == [0, 1, 2, 3]
    assert kept(logits, top_p=0.4) == [1]
    assert kept(logits, top_p=0.7) == [1, 2]
    assert kept(logits, min_p=0.4) == [1, 2]
    assert kept(logits, top_p=0.0) == [1]
    assert kept(logits, top_p=1e-9, min_p=1.0) == [1]
    assert kept(logits, min_p=2.0) == [1]
    assert kept(logits, top_k=1, top_p=0.5) == [1]
    # Rounded, the likeliest alone has a probability of 1.
    assert kept([30.0, 0.0, 1.0]) == [0, 1, 2]
    # Just as likely as asked for.
    assert kept([0.0, float(torch.tensor(0.5).log())], min_p=0.5) == [0, 1]
    # Of what top-k left, the likeliest has two thirds.
    assert kept(logits, top_k=2, top_p=0.6) == [1]


def test_equals_stay_or_go_together() -> None:
    logits = [1.0, 3.0, 2.0, 2.0, 1.0, 2.0, 0.0, -0.0]
    assert kept(logits, top_k=2) == [1, 2, 3, 5]
    assert kept(logits, top_k=4) == [1, 2, 3, 5]
    assert kept(logits, top_k=5) == [0, 1, 2, 3, 4, 5]
    assert kept(logits, top_k=7) == list(range(8))
    # The likeliest has 0.404, the three after it 0.149 each.
    assert kept(logits, top_p=0.4) == [1]
    assert kept(logits, top_p=0.41) == kept(logits, top_p=0.84) == [1, 2, 3, 5]
    assert kept(logits, top_k=2, top_p=0.9) == [1, 2, 3, 5]
    assert kept([5.0] * 3 + [-torch.inf], top_p=0.0, min_p=1.0) == [0, 1, 2]


def kept_by_definition(logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """The filters' definitions, word by word, in Python's float64."""
    largest = max(logits)
    by_k = [t for t, x in enumerate(logits) if not top_k or sum(y > x for y in logits) < top_k]
    weight = {t: math.exp((logits[t] - largest) / temperature) for t in by_k}
    whole = math.fsum(weight.values())
    stay = set()
    for token in by_k:
        likelier = math.fsum(weight[other] for other in by_k if logits[other] > logits[token])
        in_nucleus = top_p >= 1 or likelier < top_p * whole
        if logits[token] == largest or (in_nucleus and weight[token] >= min_p):
            stay.add(token)
    return stay


@pytest.mark.parametrize("vocab", [1, 2, 63, 200])
def test_filters_against_their_definitions_in_float64(vocab: int) -> None:
    generator = torch.Generator().manual_seed(vocab)
    rows, slack = 60, 1e-5
    logits = torch.randn(rows, vocab, generator=generator) * torch.rand(rows, 1, generator=generator) * 8
    # A bfloat16 model's logits are often equal.
    logits[::2] = logits[::2].bfloat16().float()
    logits[::5, : vocab // 3] = -torch.inf
    some = [torch.rand(rows, generator=generator) for _ in range(4)]
    temperature = some[0] * 2 + 0.1
    top_k = (some[1] * vocab).long() * (torch.arange(rows) % 3 != 0)
    top_p = some[2].masked_fill(torch.arange(rows) % 4 == 0, 1.0)
    min_p = (some[3] * 0.3).masked_fill(torch.arange(rows) % 4 == 1, 0.0)
    ours = keep(logits, temperature[:, None], top_k, top_p, min_p)
    ours_64 = keep(logits.double(), temperature.double()[:, None], top_k, top_p.double(), min_p.double())
    for row in range(rows):
        own = (logits[row].tolist(), float(temperature[row]), int(top_k[row]))
        p, m = float(top_p[row]), float(min_p[row])
        assert set(torch.nonzero(ours_64[row])[:, 0].tolist()) == kept_by_definition(*own, p, m)
        # Float32 may take the other side for a token that is at a bound but for rounding.
        least = kept_by_definition(*own, p - slack if p < 1 else p, m * (1 + slack))
        most = kept_by_definition(*own, p + slack, m * (1 - slack))
        assert least <= set(torch.nonzero(ours[row])[:, 0].tolist()) <= most


def test_draws_stay_in_what_the_filters_keep() -> None:
    rows, vocab = 4000, 150
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(5)).expand(rows, -1)
    for filters in ({"top_k": 4}, {"top_p": 0.2}, {"min_p": 0.5}):
        tokens = draw(logits, temperature=2.0, seed=torch.arange(rows), **filters)
        own = {"top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters
        assert set(tokens.tolist()) == kept_by_definition(logits[0].tolist(), 2.0, **own)


def test_off_the_cpu_the_host_reads_nothing_back() -> None:
    """On the meta device there are no numbers that could be read."""
    for filtered in (True, False):
        tokens = draw(torch.empty(3, 200, device="meta"), filtered=filtered, top_k=2, top_p=0.9, min_p=0.1)
        assert (tokens.shape, tokens.dtype, tokens.device.type) == ((3,), torch.int64, "meta")


@pytest.mark.parametrize("vocab_size", [50, 64, 1000, 1408])
def test_the_draw_for_a_compiler_gives_the_same_tokens(vocab_size: int) -> None:
    rows = 60
    generator = torch.Generator().manual_seed(vocab_size)
    logits = 4 * torch.randn(rows, vocab_size, generator=generator)
    logits[:, : vocab_size // 3] = -torch.inf
    # Two likeliest tokens: the first is the greedy one.
    logits[0, -2:] = 40.0
    temperature = torch.rand(rows, generator=generator) + 0.1
    temperature[::4] = 0
    seeds, choices, positions = torch.arange(3 * rows).view(3, rows)
    noise = gumbel_noise(seeds, choices, positions, compilable.num_places(vocab_size))
    given = logits.clone()
    drawn, largest = compilable.draw(logits, temperature, noise)
    assert torch.equal(logits, given)
    expected = draw(logits, temperature=temperature, seed=seeds, choice=choices, position=positions, filtered=False)
    assert drawn.tolist() == expected.tolist()
    assert int(drawn[0]) == vocab_size - 2
    assert len(set(drawn.tolist())) > 5
    divisor = torch.where(temperature == 0, 1.0, temperature)
    torch.testing.assert_close(largest, logits.amax(dim=-1) / divisor)


def test_the_draw_for_a_compiler_tells_rows_that_mean_nothing() -> None:
    logits = torch.zeros(4, 200)
    logits[0, 150] = torch.nan
    logits[1] = -torch.inf
    logits[2, 7] = torch.inf
    temperature = torch.tensor([1.0, 0.7, 0.0, 1.0])
    drawn, largest = compilable.draw(logits, temperature, torch.zeros(4, compilable.num_places(200)))
    assert largest.isfinite().tolist() == [False, False, False, True]
    assert ((drawn >= 0) & (drawn < 4 * GROUP)).all()
