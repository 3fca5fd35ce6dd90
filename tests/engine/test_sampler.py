"""What each sampling parameter does to the choice, and that a row's choice is its own business."""

from typing import Any

import pytest
import torch

from sightline_kernels.sample.reference import sample
from sightline_server.engine.sampler import Sampled, choose_tokens
from sightline_server.engine.types import Prompt, Request, SamplingParams, Sequence

VOCAB = 64


def make_sequence(generated: tuple[int, ...] = (), prompt: tuple[int, ...] = (1, 2, 3), **params: Any) -> Sequence:
    params = {"max_tokens": 9, "temperature": 0.0} | params
    request = Request(id="r", prompt=Prompt(prompt), sampling=SamplingParams(**params))
    return Sequence(request, [*prompt, *generated])


def logits(**values: float) -> torch.Tensor:
    row = torch.zeros(1, VOCAB)
    for name, value in values.items():
        row[0, int(name[1:])] = value
    return row


def choose(row: torch.Tensor, sequence: Sequence) -> Sampled:
    return choose_all(row, [sequence])[0]


def choose_all(rows: torch.Tensor, sequences: list[Sequence]) -> list[Sampled]:
    drawn = choose_tokens(rows, sequences, sample)
    return drawn.read(drawn.tensors)


def test_greedy_takes_the_best() -> None:
    assert choose(logits(t9=1.0), make_sequence()) == Sampled(9)


def test_logit_bias_is_added() -> None:
    row = logits(t9=1.0)
    assert choose(row, make_sequence(logit_bias={9: -100.0, 5: 0.5})).token_id == 5
    assert torch.equal(row, logits(t9=1.0)), "the caller's logits were changed"


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_all_seen_tokens() -> None:
    assert choose(logits(t2=2.0, t9=1.5), make_sequence(repetition_penalty=2.0)).token_id == 9
    negative = torch.full((1, VOCAB), -9.0)
    negative[0, 2], negative[0, 9] = -1.0, -1.5
    assert choose(negative, make_sequence(repetition_penalty=2.0)).token_id == 9
    assert choose(logits(t2=2.0, t9=0.9), make_sequence(repetition_penalty=2.0)).token_id == 2


def test_presence_and_frequency_penalties_count_the_answer_alone() -> None:
    row = logits(t2=2.0, t7=1.9)
    assert choose(row, make_sequence(presence_penalty=2.0)).token_id == 2
    assert choose(row, make_sequence((2,), presence_penalty=0.2)).token_id == 7
    assert choose(row, make_sequence((2,), frequency_penalty=0.06)).token_id == 2
    assert choose(row, make_sequence((2, 2), frequency_penalty=0.06)).token_id == 7
    assert choose(row, make_sequence((2, 2), presence_penalty=0.06)).token_id == 2


def test_min_tokens_forbids_the_stop_tokens_until_then() -> None:
    row = logits(t2=2.0, t7=1.9)
    assert choose(row, make_sequence(min_tokens=1, stop_token_ids=(2,))).token_id == 7
    assert choose(row, make_sequence((5,), min_tokens=1, stop_token_ids=(2,))).token_id == 2


def test_a_seed_decides_and_position_and_choice_vary_it() -> None:
    row = torch.zeros(1, VOCAB)
    draws = [choose(row, make_sequence((1,) * n, temperature=1.0, seed=5, choice=c)) for n in range(6) for c in (0, 1)]
    again = [choose(row, make_sequence((1,) * n, temperature=1.0, seed=5, choice=c)) for n in range(6) for c in (0, 1)]
    assert draws == again
    assert len({draw.token_id for draw in draws}) > 8
    other = choose(row, make_sequence(temperature=1.0, seed=2**64 - 1))
    assert 0 <= other.token_id < VOCAB


def test_low_temperature_approaches_greedy_and_top_k_bounds_the_draw() -> None:
    row = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    best = row.topk(3).indices[0].tolist()
    assert {choose(row, make_sequence(temperature=0.01, seed=s)).token_id for s in range(20)} == {best[0]}
    assert {choose(row, make_sequence(temperature=5.0, top_k=3, seed=s)).token_id for s in range(60)} == set(best)


@pytest.mark.parametrize("temperature", [1e-4, 1e-30, 1e-38, 1e-40, 5e-324])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 5}])
def test_a_temperature_next_to_nothing_is_greedy(temperature: float, filters: dict[str, Any]) -> None:
    """Logits over a temperature so small overflow: several tokens would be infinitely likely, and the first win."""
    row = logits(t3=20.0, t9=30.0, t40=25.0)
    assert {choose(row, make_sequence(temperature=temperature, seed=s, **filters)).token_id for s in range(5)} == {9}


def test_logprobs_are_those_of_the_unmodified_distribution() -> None:
    row = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(0))
    expected = row.log_softmax(-1)[0]
    sampled = choose(row, make_sequence(logprobs=True, top_logprobs=4, logit_bias={3: 100.0}, temperature=2.0, seed=1))
    assert sampled.token_id == 3
    assert sampled.logprob == pytest.approx(float(expected[3]))
    assert [top.token_id for top in sampled.top_logprobs] == expected.topk(4).indices.tolist()
    assert [top.logprob for top in sampled.top_logprobs] == pytest.approx(expected.topk(4).values.tolist())
    assert choose(row, make_sequence(logprobs=True)).top_logprobs == ()


def test_rows_do_not_touch_each_other() -> None:
    rows = torch.randn(5, VOCAB, generator=torch.Generator().manual_seed(2))
    sequences = [
        make_sequence(),
        make_sequence((4, 4), temperature=0.7, seed=1, top_p=0.8, logprobs=True, top_logprobs=2),
        make_sequence(temperature=1.0, seed=2, frequency_penalty=1.0),
        make_sequence(temperature=1.3, seed=3, min_p=0.1, logprobs=True),
        make_sequence(temperature=0.0, logit_bias={1: 50.0}),
    ]
    together = choose_all(rows, sequences)
    alone = [choose(rows[i : i + 1], sequence) for i, sequence in enumerate(sequences)]
    assert together == alone
