"""A canary among 63 mates that mean harm, in a cache that is full: its bytes are those of a run alone."""

import random
from collections import Counter
from typing import Any

import pytest
import torch
from engines import Album, Answer, make_engine, make_prompt, make_request, picture, run, run_step

from sightline_models.vlm import Vlm
from sightline_server.engine.engine import Engine
from sightline_server.engine.types import FinishReason, Request

MATES = 63
BAD_TOKEN = 2
"""Its embedding is no number."""
KINDS = ("leaves", "memory", "bug", "nan", "long", "penalties", "bias", "logprobs", "stops", "pictures", "greedy")


def canary_of(model: Vlm, album: Album) -> Request:
    look = picture(model.config.vision.image_size, 5)
    prompt = make_prompt(model, album, [9, look, 21], seed=5)
    asked: dict[str, Any] = {"temperature": 0.8, "seed": 3, "top_p": 0.9, "logprobs": True, "top_logprobs": 3}
    return make_request("canary", prompt, max_tokens=12, **asked)


def mate_of(model: Vlm, album: Album, rng: random.Random, number: int) -> Request:
    kind = KINDS[number % len(KINDS)]
    vocab = model.config.decoder.vocab_size
    parts: list[Any] = [rng.randint(1, 12)]
    asked: dict[str, Any] = {"max_tokens": rng.randint(4, 16), "temperature": rng.choice((0.0, 1.0)), "seed": number}
    match kind:
        case "long":
            parts = [rng.randint(60, 90)]
        case "leaves":
            asked["max_tokens"] = 60
        case "pictures":
            parts += [picture(model.config.vision.image_size, rng.randint(1, 6)), rng.randint(1, 5)]
        case "penalties":
            asked |= {"presence_penalty": 2.0, "frequency_penalty": -2.0, "repetition_penalty": 10.0}
        case "bias":
            asked["logit_bias"] = {token: rng.choice((-100.0, 100.0)) for token in range(0, vocab, 3)}
        case "logprobs":
            asked |= {"logprobs": True, "top_logprobs": 20}
        case "stops":
            asked |= {"stop_token_ids": tuple(range(vocab)), "min_tokens": rng.randint(0, 1)}
    prompt = make_prompt(model, album, parts, seed=rng.randint(0, 9))
    if kind == "nan":
        prompt = type(prompt)((*prompt.token_ids, BAD_TOKEN, 9), prompt.images)
    return make_request(f"{kind}-{number}", prompt, **asked)


def sabotage(engine: Engine, rng: random.Random) -> None:
    """Steps fail for those whose name says so, from some token on."""
    begins = {number: rng.randint(1, 30) for number in range(MATES)}
    batch = engine._runner._batch

    def fail(slices: Any) -> Any:
        for piece in slices:
            kind, _, number = piece.sequence.id.partition("-")
            if kind in ("memory", "bug") and piece.start + piece.length >= begins[int(number)]:
                raise torch.OutOfMemoryError("CUDA out of memory") if kind == "memory" else RuntimeError("planted")
        return batch(slices)

    engine._runner._batch = fail  # type: ignore[method-assign]


def watch_the_cache(engine: Engine) -> list[float]:
    """Fills with how full the cache was, whenever a block of it was taken."""
    shares: list[float] = []
    blocks, allocate = engine._blocks, engine._blocks.allocate

    def noted(count: int) -> list[int]:
        taken = allocate(count)
        shares.append(blocks.num_used / blocks.num_blocks)
        return taken

    blocks.allocate = noted  # type: ignore[method-assign]
    return shares


def told(answer: Answer) -> list[Any]:
    return [(event.token_id, event.logprob, event.top_logprobs) for event in answer.events]


def canary_among_hostile_mates(model: Vlm, rounds: int, monkeypatch: pytest.MonkeyPatch) -> None:
    album = Album()
    canary = canary_of(model, album)
    assert BAD_TOKEN not in canary.prompt.token_ids
    expected = told(run(make_engine(model, deterministic=True), [canary], album)["canary"])
    assert len(expected) == 12
    assert BAD_TOKEN not in [token for token, *_ in expected]
    embed = Vlm.embed

    def spoil(self: Vlm, token_ids_T: torch.Tensor) -> torch.Tensor:
        return embed(self, token_ids_T).masked_fill((token_ids_T == BAD_TOKEN)[:, None], torch.nan)

    monkeypatch.setattr(Vlm, "embed", spoil)
    ends: Counter[tuple[str, FinishReason]] = Counter()
    preempted = 0
    for seed in range(rounds):
        rng = random.Random(seed)
        engine = make_engine(
            model,
            deterministic=True,
            num_blocks=rng.randint(28, 34),
            max_model_len=110,
            max_step_tokens=rng.choice((33, 64, 512)),
            max_running=rng.choice((16, 64)),
            prefix_caching=rng.random() < 0.7,
            overlap=seed % 2 == 1,
        )
        sabotage(engine, rng)
        fullest = watch_the_cache(engine)
        requests = [mate_of(model, album, rng, number) for number in range(MATES)]
        requests.insert(rng.randrange(MATES), canary)
        answers = {request.id: Answer() for request in requests}
        leaving = [request.id for request in requests if request.id.startswith("leaves")]
        for request in requests:
            engine.add(request)
        for _ in range(4000):
            if not engine.has_work:
                break
            run_step(engine, album, answers)
            if leaving and rng.random() < 0.1:
                engine.abort(leaving.pop())
        engine.check_integrity()
        assert told(answers["canary"]) == expected, f"round {seed}"
        assert engine.stats().blocks_used == 0
        assert max(fullest) >= 0.95, f"round {seed}: the cache was never more than {max(fullest):.0%} full"
        preempted += engine.stats().preemptions_total > 0
        for name, answer in answers.items():
            # Whoever draws the bad token has no numbers after it, either.
            drew_it = answer.token_ids[-1:] == [BAD_TOKEN]
            ends["nan" if drew_it else name.partition("-")[0], answer.reason] += 1
    assert preempted > 0.8 * rounds, f"only {preempted} of {rounds} rounds preempted anything"
    for kind in ("memory", "bug", "nan"):
        assert ends[kind, FinishReason.ERROR] > 2 * rounds, ends
    # To one that stops at every token and may not stop yet, no token is left.
    guilty = {"memory", "bug", "nan", "stops"}
    assert {kind for kind, reason in ends if reason is FinishReason.ERROR} == guilty, ends


def test_E1_E2_E3_J10_J11_J13_a_canary_among_63_hostile_mates(tiny: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    canary_among_hostile_mates(tiny, 20, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_E1_E2_E3_J10_J11_J13_a_canary_among_63_hostile_mates_1000_times(
    tiny: Vlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    canary_among_hostile_mates(tiny, 1000, monkeypatch)
