"""An engine whose decode steps are compiled: the same answers, and plain steps where they aren't decodes alone."""

import shutil
import tempfile
from typing import Any

import pytest
import torch
from engines import Album, make_engine, make_prompt, make_request, picture, requests_of, run, told

from sightline_models.vlm import Vlm
from sightline_server.engine import runner
from sightline_server.engine.engine import Engine
from sightline_server.engine.load import check_compilable
from sightline_server.engine.sampler import choose_tokens
from sightline_server.settings import Settings, SettingsError, replace

# Compiling takes as long as the machine lets it.
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler here"),
    pytest.mark.timeout(600),
]


@pytest.fixture(scope="module")
def compiled(tiny: Vlm, tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """With a cache so small that answers are preempted, and steps launched before the last one's tokens are known."""
    scratch = tmp_path_factory.mktemp("scratch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(scratch))
        engine = make_engine(tiny, compiles=True, overlap=True, num_blocks=44, max_model_len=170, max_running=8)
    assert not list(scratch.iterdir()), "something is left of compiling"
    return engine


def counted(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every step that is computed by the program, from now on."""
    decoder: Any = engine._runner._compiled
    step, rows = decoder.step, []

    def noted(token_ids_B: torch.Tensor, *rest: Any) -> Any:
        rows.append(len(token_ids_B))
        return step(token_ids_B, *rest)

    monkeypatch.setattr(decoder, "step", noted)
    return rows


def test_answers_equal_the_plain_ones(tiny: Vlm, compiled: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    album = Album()
    requests = requests_of(tiny, album, 12)
    expected = told(run(make_engine(tiny), requests, album))
    rows = counted(compiled, monkeypatch)
    for _ in range(2):
        assert told(run(compiled, requests, album)) == expected
    assert compiled.stats().preemptions_total > 0
    assert compiled.stats().blocks_used == 0
    assert 1 in rows
    assert max(rows) > 2
    # Steps that read prompts were none of its business.
    assert len(rows) < compiled.stats().steps_total


def test_plain_draws_are_the_programs_own(tiny: Vlm, compiled: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    album = Album()
    requests = requests_of(tiny, album, 8, top_p=1.0)
    expected = told(run(make_engine(tiny), requests, album))
    programs, others = counted(compiled, monkeypatch), []

    def noted(logits_SV: torch.Tensor, *rest: Any) -> Any:
        others.append(len(logits_SV))
        return choose_tokens(logits_SV, *rest)

    monkeypatch.setattr(runner, "choose_tokens", noted)
    assert told(run(compiled, requests, album)) == expected
    assert sum(programs) > sum(others) > 0, "drawn outside were more than the first tokens of prompts"
    assert sum(others) <= len(requests) + compiled.stats().preemptions_total


def test_log_probabilities_and_penalties_are_those_of_plain_steps(tiny: Vlm, compiled: Engine) -> None:
    album = Album()
    requests = requests_of(tiny, album, 4, logprobs=True, top_logprobs=3, presence_penalty=0.7, min_tokens=3)
    plain, answers = run(make_engine(tiny), requests, album), run(compiled, requests, album)
    assert told(answers) == told(plain)
    for name, answer in answers.items():
        assert answer.logprobs == pytest.approx(plain[name].logprobs, abs=1e-4)


def test_a_token_that_stands_for_a_picture_is_none_of_its_business(
    tiny: Vlm, compiled: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone it looks like a decode: all that was before it is found in the cache."""
    album = Album()
    block, look = compiled._config.block_size, picture(tiny.config.vision.image_size, 1)
    before = next(n for n in range(3, 99) if len(make_prompt(tiny, album, [n, look]).token_ids) % block == 1)
    request = make_request("a", make_prompt(tiny, album, [before, look]), max_tokens=6)
    expected = run(make_engine(tiny), [request], album)["a"].token_ids
    rows = counted(compiled, monkeypatch)
    for _ in range(2):
        answer = run(compiled, [request], album)["a"]
        assert answer.token_ids == expected
        assert len(rows) == 5
        rows.clear()
    assert answer.finish is not None
    assert answer.finish.usage.cached_tokens == len(request.prompt.token_ids) - 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"deterministic": True}, "--deterministic forbids"),
        ({"device": "cuda:0"}, "replays CUDA graphs"),
    ],
)
def test_settings_that_it_does_not_go_with_are_named(tiny: Vlm, changes: dict[str, Any], why: str) -> None:
    settings = replace(Settings(), compile=True, **changes)
    with pytest.raises(SettingsError, match=why):
        check_compilable(tiny, settings, torch.device("cpu" if settings.device == "auto" else settings.device))


def test_E3_a_program_that_fails_is_given_up_and_every_answer_comes(
    tiny: Vlm, compiled: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    album = Album()
    requests = requests_of(tiny, album, 6)
    expected = told(run(make_engine(tiny), requests, album))

    def failing(*_: Any) -> torch.Tensor:
        raise RuntimeError("planted")

    monkeypatch.setattr(compiled._runner, "_compiled", compiled._runner._compiled)
    monkeypatch.setattr(compiled._runner._compiled, "step", failing)
    assert told(run(compiled, requests, album)) == expected
    assert compiled._runner._compiled is None
