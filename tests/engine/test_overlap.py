"""Steps launched before the tokens of the one before are known, and steps replayed from recordings: same answers.

A recording is stood in for by work done again into the same tensors (``CallAgain``), so that buffers, padding and the
order of things are proven without a GPU.
"""

import random
from typing import Any

import pytest
import torch
from engines import Album, Answer, make_engine, make_prompt, make_request, picture, requests_of, run, run_step, told

from sightline_models.vlm import Vlm
from sightline_server.engine.engine import Engine
from sightline_server.engine.types import FinishReason, TokenEvent

LATE: dict[str, Any] = {"overlap": True}
RECORDED: dict[str, Any] = {"graphs": True}
MODES = [
    pytest.param(LATE, id="late"),
    pytest.param(RECORDED, id="recorded"),
    pytest.param(LATE | RECORDED, id="late-and-recorded"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "bounds",
    [
        pytest.param({}, id="roomy"),
        pytest.param({"max_step_tokens": 7}, id="chunks-of-7"),
        pytest.param({"num_blocks": 44, "max_model_len": 170}, id="preempting"),
        pytest.param({"max_running": 3}, id="three-at-once"),
        pytest.param({"prefix_caching": False, "encoder_cache_bytes": 0}, id="no-caches"),
    ],
)
def test_answers_equal_the_plain_ones(tiny: Vlm, recordable: Vlm, mode: dict[str, Any], bounds: dict[str, Any]) -> None:
    album = Album()
    requests = requests_of(tiny, album, 12)
    expected = told(run(make_engine(tiny), requests, album))
    engine = make_engine(recordable, **bounds, **mode)
    for _ in range(2):
        assert told(run(engine, requests, album)) == expected
    stats = engine.stats()
    assert (stats.preemptions_total > 0) == (bounds.get("num_blocks") == 44)
    assert (stats.graph_steps_total > 0) == ("graphs" in mode)
    assert stats.blocks_used == 0


@pytest.mark.parametrize("mode", MODES)
def test_what_a_draw_asks_beside_the_logits_is_honoured(tiny: Vlm, recordable: Vlm, mode: dict[str, Any]) -> None:
    album = Album()
    prompt = make_prompt(tiny, album, [9])
    params: dict[str, dict[str, Any]] = {
        "plain": {},
        "biased": {"logit_bias": {7: 100.0}},
        "penalized": {"presence_penalty": 1.5, "frequency_penalty": 1.0, "temperature": 1.0, "seed": 3},
        "repeating": {"repetition_penalty": 3.0},
        "sampled": {"temperature": 1.2, "seed": 9, "top_k": 7, "min_p": 0.01},
    }
    requests = [make_request(name, prompt, max_tokens=12, **more) for name, more in params.items()]
    expected = run(make_engine(tiny), requests, album)
    got = run(make_engine(recordable, **mode), requests, album)
    assert told(got) == told(expected)
    assert set(got["biased"].token_ids) == {7}
    assert len({tuple(answer.token_ids) for answer in got.values()}) == len(params)


@pytest.mark.parametrize("mode", MODES)
def test_log_probabilities_are_those_of_the_same_step(tiny: Vlm, recordable: Vlm, mode: dict[str, Any]) -> None:
    album = Album()
    requests = requests_of(tiny, album, 5)
    requests += requests_of(tiny, album, 5, logprobs=True, top_logprobs=3, max_tokens=9)[3:]
    requests = list({request.id: request for request in requests}.values())
    expected = run(make_engine(tiny), requests, album)
    for name, answer in run(make_engine(recordable, **mode), requests, album).items():
        assert answer.token_ids == expected[name].token_ids
        for event, other in zip(answer.events, expected[name].events, strict=True):
            assert (event.logprob is None) == (other.logprob is None)
            if event.logprob is not None:
                assert event.logprob == pytest.approx(other.logprob, abs=1e-5)
                assert [top.token_id for top in event.top_logprobs] == [top.token_id for top in other.top_logprobs]


@pytest.mark.parametrize("mode", MODES)
def test_a_stop_token_that_is_learned_late_ends_unseen(tiny: Vlm, recordable: Vlm, mode: dict[str, Any]) -> None:
    album = Album()
    free = run(make_engine(tiny), requests_of(tiny, album, 9, max_tokens=14), album)
    stopping = [
        make_request(
            request.id,
            request.prompt,
            max_tokens=14,
            temperature=request.sampling.temperature,
            seed=request.sampling.seed,
            top_p=request.sampling.top_p,
            stop_token_ids=(free[request.id].token_ids[3 + i % 5],),
        )
        for i, request in enumerate(requests_of(tiny, album, 9))
    ]
    expected = run(make_engine(tiny), stopping, album)
    assert {answer.reason for answer in expected.values()} == {FinishReason.STOP}
    for bounds in ({}, {"num_blocks": 44, "max_model_len": 170}):
        engine = make_engine(recordable, **bounds, **mode)
        assert told(run(engine, stopping, album)) == told(expected)
        # Tokens computed in vain are told nobody and counted nowhere.
        assert engine.stats().generated_tokens_total == sum(
            answer.finish.usage.completion_tokens for answer in expected.values() if answer.finish
        )


def test_events_come_one_step_late_and_no_step_is_computed_in_vain(tiny: Vlm) -> None:
    album = Album()
    engine = make_engine(tiny, **LATE)
    engine.add(make_request("a", make_prompt(tiny, album, [6]), max_tokens=3))
    told_at = [[type(event).__name__ for event in engine.step()] for _ in range(4)]
    assert told_at == [[], ["TokenEvent"], ["TokenEvent"], ["TokenEvent", "FinishEvent"]]
    # The length of an answer is known before its tokens are.
    assert engine.stats().steps_total == 3
    assert engine.step() == []
    assert not engine.has_work


def test_an_abort_while_its_step_is_in_flight_frees_at_once(tiny: Vlm) -> None:
    album = Album()
    engine = make_engine(tiny, **LATE)
    answers = {name: Answer() for name in ("gone", "stays")}
    for name in answers:
        engine.add(make_request(name, make_prompt(tiny, album, [6], seed=len(name)), max_tokens=9))
    for _ in range(4):
        run_step(engine, album, answers)
    used = engine.stats().blocks_used
    engine.abort("gone")
    assert engine.stats().blocks_used < used
    engine.check_integrity()
    seen = len(answers["gone"].token_ids)
    while engine.has_work:
        run_step(engine, album, answers)
        engine.check_integrity()
    assert answers["gone"].reason is FinishReason.ABORTED
    assert len(answers["gone"].token_ids) == seen
    alone = run(make_engine(tiny), [make_request("stays", make_prompt(tiny, album, [6], seed=5), max_tokens=9)], album)
    assert answers["stays"].token_ids == alone["stays"].token_ids


@pytest.mark.parametrize("mode", [pytest.param({}, id="plain"), *MODES])
def test_an_answers_blocks_are_found_by_the_next_turn(recordable: Vlm, mode: dict[str, Any]) -> None:
    album = Album()
    engine = make_engine(recordable, **mode)
    prompt = make_prompt(recordable, album, [6, picture(recordable.config.vision.image_size, 1), 3])
    answer = run(engine, [make_request("a", prompt, max_tokens=21)], album)["a"]
    said = (*prompt.token_ids, *answer.token_ids, 9, 8)
    turn = make_request("b", type(prompt)(said, prompt.images))
    got = run(engine, [turn], album)["b"]
    assert got.finish is not None
    # The answer's last token was never fed back; all before it fill blocks of four.
    assert got.finish.usage.cached_tokens == (len(prompt.token_ids) + 20) // 4 * 4
    cold = run(make_engine(recordable, prefix_caching=False), [turn], album)["b"]
    assert got.token_ids == cold.token_ids


def test_recordings_are_padded_to_the_next_size_and_larger_batches_run_plain(tiny: Vlm, recordable: Vlm) -> None:
    album = Album()
    requests = [make_request(f"r{i}", make_prompt(tiny, album, [4], seed=i), max_tokens=6) for i in range(7)]
    expected = told(run(make_engine(tiny), requests, album))
    engine = make_engine(recordable, **RECORDED)
    assert told(run(engine, requests, album)) == expected
    # One step reads the prompts; in the five others, seven rows stand in the recording for eight.
    assert (engine.stats().steps_total, engine.stats().graph_steps_total) == (6, 5)


def test_a_decode_beside_a_prompt_is_no_step_for_a_recording(recordable: Vlm) -> None:
    album = Album()
    engine = make_engine(recordable, max_step_tokens=4, **RECORDED)
    answers = {name: Answer() for name in "ab"}
    engine.add(make_request("a", make_prompt(recordable, album, [3]), max_tokens=20))
    for _ in range(3):
        run_step(engine, album, answers)
    assert engine.stats().graph_steps_total == 2
    engine.add(make_request("b", make_prompt(recordable, album, [9]), max_tokens=2))
    for _ in range(3):
        run_step(engine, album, answers)
    assert engine.stats().graph_steps_total == 2
    assert len(answers["a"].token_ids) == 6, "the running answer got a token a step while the other prompt was read"


def test_a_prompts_last_token_may_be_a_pictures(tiny: Vlm, recordable: Vlm) -> None:
    """Read alone, it looks like a decode, and a recording knows no pictures."""
    album = Album()
    prompt = make_prompt(tiny, album, [5, picture(tiny.config.vision.image_size, 1)])
    request = make_request("a", prompt, max_tokens=6)
    alone = {"max_step_tokens": len(prompt.token_ids) - 1}
    expected = told(run(make_engine(tiny), [request], album))
    assert told(run(make_engine(tiny, **alone), [request], album)) == expected
    engine = make_engine(recordable, **alone, **RECORDED)
    assert told(run(engine, [request], album)) == expected
    assert engine.stats().graph_steps_total == 5


def test_deterministic_bytes_do_not_depend_on_being_late(tiny: Vlm) -> None:
    album = Album()
    requests = requests_of(tiny, album, 6, logprobs=True)
    plain = run(make_engine(tiny, deterministic=True), requests, album)
    late = run(make_engine(tiny, deterministic=True, **LATE), requests, album)
    for name, answer in plain.items():
        assert (late[name].token_ids, late[name].logprobs) == (answer.token_ids, answer.logprobs)


def test_out_of_memory_with_a_step_in_flight_ends_the_largest_alone(tiny: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    album = Album()
    engine = make_engine(tiny, max_step_tokens=64, **LATE)
    answers = {name: Answer() for name in ("small", "huge")}
    small = make_request("small", make_prompt(tiny, album, [5]), max_tokens=12)
    engine.add(small)
    for _ in range(3):
        run_step(engine, album, answers)
    true_forward = Vlm.forward

    def scarce(self: Vlm, hidden_TD: torch.Tensor, *rest: Any) -> torch.Tensor:
        if hidden_TD.shape[0] > 20:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true_forward(self, hidden_TD, *rest)

    monkeypatch.setattr(Vlm, "forward", scarce)
    engine.add(make_request("huge", make_prompt(tiny, album, [60])))
    while engine.has_work:
        run_step(engine, album, answers)
        engine.check_integrity()
    assert answers["huge"].finish is not None
    assert answers["huge"].finish.error_code == "engine_oom"
    monkeypatch.undo()
    assert answers["small"].token_ids == run(make_engine(tiny), [small], album)["small"].token_ids


@pytest.mark.parametrize("seed", range(6))
def test_whatever_comes_and_goes_every_answer_is_its_own(tiny: Vlm, recordable: Vlm, seed: int) -> None:
    """Requests arrive, are aborted and stop at random times in a cache too small for them."""
    album, rng = Album(), random.Random(seed)
    pool = requests_of(tiny, album, 10)
    expected = {request.id: run(make_engine(tiny), [request], album)[request.id].token_ids for request in pool}
    mode = (LATE, RECORDED, LATE | RECORDED)[seed % 3]
    engine = make_engine(
        recordable, num_blocks=48, max_model_len=180, max_running=5, max_step_tokens=rng.choice((9, 40)), **mode
    )
    answers: dict[str, Answer] = {}
    origin: dict[str, str] = {}
    for turn in range(160):
        if turn < 120 and rng.random() < 0.35:
            chosen = rng.choice(pool)
            name = f"{chosen.id}-{turn}"
            answers[name], origin[name] = Answer(), chosen.id
            engine.add(type(chosen)(id=name, prompt=chosen.prompt, sampling=chosen.sampling))
        if answers and rng.random() < 0.08:
            engine.abort(rng.choice(list(answers)))
        if engine.has_work:
            run_step(engine, album, answers)
            engine.check_integrity()
    _finish(engine, album, answers)
    for name, answer in answers.items():
        whole = expected[origin[name]]
        if answer.reason is FinishReason.ABORTED:
            assert answer.token_ids == whole[: len(answer.token_ids)]
        else:
            assert answer.token_ids == whole
    assert sum(answer.reason is FinishReason.LENGTH for answer in answers.values()) > 10


def _finish(engine: Engine, album: Album, answers: dict[str, Answer]) -> None:
    while engine.has_work:
        run_step(engine, album, answers)
    engine.check_integrity()
    assert engine.stats().blocks_used == 0
    assert all(isinstance(event, TokenEvent) for answer in answers.values() for event in answer.events)
