"""``--deterministic``: a request's bytes are its own, whoever runs beside it and however often it is thrown out."""

import random
from typing import Any

import pytest
from engines import Album, Answer, make_engine, make_prompt, make_request, picture, run

from sightline_models.vlm import Vlm
from sightline_server.engine.types import Request

MATES = 31


def canary_of(model: Vlm, album: Album) -> Request:
    look = picture(model.config.vision.image_size, 5)
    return make_request(
        "canary",
        make_prompt(model, album, [9, look, 21], seed=5),
        max_tokens=16,
        temperature=0.8,
        seed=3,
        top_p=0.9,
        logprobs=True,
        top_logprobs=3,
    )


def told(answers: dict[str, Answer]) -> list[Any]:
    """Tokens and probabilities to the last bit."""
    return [(event.token_id, event.logprob, event.top_logprobs) for event in answers["canary"].events]


def canary_among_mates(model: Vlm, rounds: int) -> None:
    album = Album()
    canary = canary_of(model, album)
    expected = told(run(make_engine(model, deterministic=True), [canary], album))
    assert len(expected) == 16
    preempted = canary_preempted = 0
    for seed in range(rounds):
        rng = random.Random(seed)
        mates = []
        for i in range(MATES):
            parts: list[Any] = [rng.randint(1, 30)]
            if rng.random() < 0.3:
                parts += [picture(model.config.vision.image_size, rng.randint(1, 6)), rng.randint(1, 5)]
            asked = {"max_tokens": rng.randint(1, 20), "temperature": rng.choice((0.0, 1.0)), "seed": seed}
            mates.append(make_request(f"m{i}", make_prompt(model, album, parts, seed=rng.randint(0, 9)), **asked))
        place = rng.randrange(4, MATES + 1)
        engine = make_engine(
            model,
            deterministic=True,
            num_blocks=rng.randint(28, 36),
            max_model_len=110,
            max_step_tokens=rng.choice((33, 64, 512)),
            max_running=32,
            prefix_caching=rng.random() < 0.5,
            overlap=seed % 2 == 1,
        )
        preempting = engine._scheduler._preempt
        thrown_out: list[str] = []

        def preempt(sequence: Any, preempting: Any = preempting, thrown_out: list[str] = thrown_out) -> None:
            thrown_out.append(sequence.id)
            preempting(sequence)

        engine._scheduler._preempt = preempt  # type: ignore[method-assign]
        answers = run(engine, [*mates[:place], canary, *mates[place:]], album)
        assert told(answers) == expected, f"round {seed}"
        preempted += bool(thrown_out)
        canary_preempted += "canary" in thrown_out
    assert preempted > 0.8 * rounds, f"only {preempted} of {rounds} rounds preempted anything"
    assert canary_preempted > 0.1 * rounds, f"only {canary_preempted} of {rounds} rounds preempted the canary"


def test_a_canary_among_31_mates_that_preempt(tiny: Vlm) -> None:
    canary_among_mates(tiny, 30)


@pytest.mark.slow
def test_a_canary_among_31_mates_that_preempt_200_times(tiny: Vlm) -> None:
    canary_among_mates(tiny, 200)
