"""What no step could compute is refused before the device sees it, whatever the HTTP side let through."""

import math
from typing import Any

import pytest
from engines import Album, make_engine, make_prompt, make_request, run

from sightline_models.vlm import Vlm
from sightline_server.engine.admission import refusal
from sightline_server.engine.types import FinishReason, ImageSpan, Prompt

VOCAB = 100


TWO = Prompt((5, 6))


def refused(prompt: Prompt = TWO, **params: Any) -> tuple[str, str] | None:
    return refusal(make_request("r", prompt, **params), max_model_len=32, vocab_size=VOCAB)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-1.0, math.nan, math.inf]),
        ("top_p", [-0.1, 1.1, math.nan]),
        ("top_k", [-5, 2**64]),
        ("min_p", [-0.1, 1.5, math.nan]),
        ("presence_penalty", [math.nan, math.inf]),
        ("frequency_penalty", [math.nan, -math.inf]),
        ("repetition_penalty", [0.0, -1.0, math.nan, math.inf]),
        ("seed", [-1, 2**64]),
        ("max_tokens", [0, -1]),
        ("min_tokens", [-1]),
    ],
)
def test_J10_numbers_out_of_bounds_are_refused_by_name(name: str, values: list[Any]) -> None:
    for value in values:
        found = refused(**{name: value})
        assert found is not None, value
        assert found[0] == "invalid_value"
        assert name in found[1]


@pytest.mark.parametrize("bias", [{-1: 1.0}, {VOCAB: 1.0}, {10**9: 1.0}, {3: math.nan}, {3: math.inf}])
def test_J11_a_bias_beyond_the_vocabulary_never_reaches_the_device(bias: dict[int, float]) -> None:
    found = refused(logit_bias=bias)
    assert found is not None
    assert "logit_bias" in found[1]
    assert refused(logit_bias=dict.fromkeys(range(VOCAB), -100.0)) is None


@pytest.mark.parametrize("count", [-1, 21, 10**6])
def test_J13_no_more_likeliest_tokens_than_the_api_gives(count: int) -> None:
    found = refused(logprobs=True, top_logprobs=count)
    assert found is not None
    assert "top_logprobs" in found[1]
    assert refused(logprobs=True, top_logprobs=20) is None


@pytest.mark.parametrize("token_id", [-1, VOCAB, 2**40])
def test_a_token_beyond_the_vocabulary_is_refused(token_id: int) -> None:
    assert refused(Prompt((5, token_id))) is not None
    assert refused(min_tokens=1, stop_token_ids=(token_id,)) is not None
    # Never forbidden, it is merely never drawn.
    assert refused(stop_token_ids=(token_id,)) is None


@pytest.mark.parametrize(
    "spans",
    [
        [ImageSpan(1, 2, b"a")],
        [ImageSpan(-1, 2, b"a")],
        [ImageSpan(0, 0, b"a")],
        [ImageSpan(2**63, 1, b"a")],
        [ImageSpan(1, 1, b"a"), ImageSpan(0, 1, b"b")],
    ],
)
def test_pictures_that_lie_nowhere_are_refused(spans: list[ImageSpan]) -> None:
    assert refused(Prompt((5, 6), tuple(spans))) is not None
    assert refused(Prompt((5, 6), (ImageSpan(0, 1, b"a"), ImageSpan(1, 1, b"b")))) is None


def test_J10_J11_J13_a_refusal_costs_the_others_nothing(tiny: Vlm) -> None:
    album = Album()
    prompt = make_prompt(tiny, album, [6])
    odd: dict[str, dict[str, Any]] = {
        "bias": {"logit_bias": {10**9: 1.0}},
        "penalty": {"repetition_penalty": math.nan},
        "many": {"logprobs": True, "top_logprobs": 10**6},
    }
    requests = [make_request(name, prompt, **params) for name, params in odd.items()]
    expected = run(make_engine(tiny), [make_request("fine", prompt)], album)["fine"].token_ids
    answers = run(make_engine(tiny), [*requests, make_request("fine", prompt)], album)
    assert answers["fine"].token_ids == expected
    for name in odd:
        finish = answers[name].finish
        assert finish is not None
        assert (finish.reason, finish.error_code) == (FinishReason.ERROR, "invalid_value")
