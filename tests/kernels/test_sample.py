"""The sampling kernel: published Philox vectors, the distribution drawn from, the filters' definitions."""

import torch

from sightline_kernels.sample.reference import GROUP, filter_logits, gumbel_noise, philox, sample


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


def test_draws_follow_the_softmax() -> None:
    rows = 20_000
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0, -torch.inf]).expand(rows, -1)
    tokens = sample(
        logits,
        torch.ones(rows),
        torch.arange(rows),
        torch.zeros(rows, dtype=torch.int64),
        torch.zeros(rows, dtype=torch.int64),
    )
    share = torch.bincount(tokens, minlength=5) / rows
    assert (share - logits[0].softmax(0)).abs().max() < 0.012
    assert share[4] == 0


def test_draws_follow_the_softmax_across_groups() -> None:
    rows, vocab = 60_000, 3 * GROUP + 7
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(3)) * 2
    logits[GROUP : GROUP + 40] = -torch.inf
    zeros = torch.zeros(rows, dtype=torch.int64)
    tokens = sample(logits.expand(rows, -1), torch.ones(rows), torch.arange(rows), zeros, zeros)
    share, expected = torch.bincount(tokens, minlength=vocab) / rows, logits.softmax(0)
    assert share.shape == (vocab,)
    assert not share[logits == -torch.inf].any()
    # Pearson's statistic has mean ``cells - 1`` and variance twice that; five deviations leave no doubt.
    cells = expected * rows > 5
    statistic = ((share - expected)[cells] ** 2 / expected[cells]).sum() * rows
    freedom = int(cells.sum())
    assert abs(float(statistic) - freedom) < 5 * (2 * freedom) ** 0.5


def test_a_whole_group_may_be_forbidden() -> None:
    logits = torch.full((1, 2 * GROUP), -torch.inf)
    logits[0, GROUP + 3] = 1.0
    zeros = torch.zeros(1, dtype=torch.int64)
    assert sample(logits, torch.ones(1), zeros, zeros, zeros).tolist() == [GROUP + 3]


def test_temperature_zero_is_argmax_beside_sampled_rows() -> None:
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    zeros = torch.zeros(4, dtype=torch.int64)
    tokens = sample(logits, torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.arange(4), zeros, zeros)
    assert tokens[0] == logits[0].argmax()
    assert tokens[2] == logits[2].argmax()


def kept(logits: list[float], *, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[int]:
    filtered = filter_logits(
        torch.tensor([logits]), torch.tensor([top_k]), torch.tensor([top_p]), torch.tensor([min_p])
    )
    return torch.nonzero(filtered[0] > -torch.inf)[:, 0].tolist()


def test_filters_keep_what_their_definitions_say() -> None:
    half, quarter, eighth = [float(torch.tensor(p).log()) for p in (0.5, 0.25, 0.125)]
    logits = [eighth, half, quarter, eighth]
    assert kept(logits) == [0, 1, 2, 3]
    assert kept(logits, top_k=2) == [1, 2]
    assert kept(logits, top_p=0.4) == [1]
    assert kept(logits, top_p=0.7) == [1, 2]
    assert kept(logits, min_p=0.4) == [1, 2]
    assert kept(logits, top_p=1e-9, min_p=1.0) == [1]
    assert kept(logits, top_k=1, top_p=0.5) == [1]
