"""A step that fails, whatever fails in it, ends nobody but the request it fails for, and leaves nothing behind."""

import random
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from engines import Album, Answer, make_engine, make_prompt, make_request, picture, run, run_step
from faults import POINTS, Fault, plant

from sightline_models.vlm import Vlm
from sightline_server.engine.engine import Engine
from sightline_server.engine.types import FinishEvent, FinishReason, Request

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "late": {"overlap": True},
    "strict": {"deterministic": True},
    "late-and-strict": {"overlap": True, "deterministic": True},
    "recorded": {"graphs": True},
    "late-and-recorded": {"overlap": True, "graphs": True},
}
USUAL = ("plain", "late-and-strict", "late-and-recorded")
BOUNDS: dict[str, Any] = {"num_blocks": 28, "max_model_len": 110, "max_running": 6, "max_step_tokens": 64}
"""Small enough that requests wait, prompts come in pieces and answers are preempted."""
ABORTED, ABORTED_AT = "leaves", 7


def failing() -> Exception:
    return RuntimeError("planted")


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory (planted)")


ERRORS: dict[str, Callable[[], Exception]] = {"server_error": failing, "engine_oom": out_of_memory}


class Work:
    """Requests of every kind, and when they come: a second one finds the first one's prompt in the cache."""

    def __init__(self, model: Vlm) -> None:
        self.album = Album()
        side = model.config.vision.image_size

        def prompt(parts: list[Any], seed: int) -> Any:
            return make_prompt(model, self.album, parts, seed=seed)

        sampled: dict[str, Any] = {"temperature": 1.0, "seed": 5}
        album = prompt([2, picture(side, 2), 1, picture(side, 3), 3], 3)
        self.first = [
            make_request("text", prompt([9], 1), max_tokens=9),
            make_request("look", prompt([4, picture(side, 1), 5], 2), max_tokens=6, logprobs=True, top_logprobs=2),
            make_request(ABORTED, prompt([6], 6), max_tokens=40),
            *(make_request(f"choice{i}", album, max_tokens=4, choice=i, **sampled) for i in range(2)),
            make_request(
                "told-off", prompt([7], 4), max_tokens=7, presence_penalty=1.5, repetition_penalty=1.3, **sampled
            ),
            make_request("biased", prompt([5], 5), max_tokens=5, logit_bias={7: 2.0}, top_p=0.9, **sampled),
        ]
        self.later = [
            make_request("again", album, max_tokens=3),
            make_request("long", prompt([70], 7), max_tokens=3, min_tokens=2, stop_token_ids=(3,)),
        ]

    @property
    def requests(self) -> list[Request]:
        return [*self.first, *self.later]

    def drive(self, engine: Engine, ends: dict[str, Answer] | None = None) -> dict[str, Answer]:
        """What each request got; ``ends`` gets what others in the engine get."""
        answers = {request.id: Answer() for request in self.requests}
        for request in self.first:
            engine.add(request)
        for turn in range(3000):
            if turn == 3:
                for request in self.later:
                    engine.add(request)
            if turn == ABORTED_AT:
                engine.abort(ABORTED)
            if turn > ABORTED_AT and not engine.has_work:
                break
            run_step(engine, self.album, answers | (ends or {}))
        assert_nothing_held(engine)
        return answers


def assert_nothing_held(engine: Engine) -> None:
    engine.check_integrity()
    engine._check_nothing_held()
    assert not engine._live
    assert not engine._in_flight
    assert engine._probation is None
    assert engine._runner._vision.num_pinned == 0
    assert sorted(engine._scheduler._free_rows) == list(range(BOUNDS["max_running"]))


def told(answer: Answer) -> Any:
    """All that one was told; probabilities to within what batch mates change."""
    return (
        answer.token_ids,
        answer.reason,
        answer.finish and answer.finish.usage.completion_tokens,
        [[top.token_id for top in event.top_logprobs] for event in answer.events],
    )


def bytes_of(answer: Answer) -> Any:
    return told(answer), answer.logprobs, [event.top_logprobs for event in answer.events]


def assert_as_undisturbed(
    answers: Mapping[str, Answer], undisturbed: Mapping[str, Answer], *, exact: bool, but: str | None = None
) -> None:
    for name, answer in answers.items():
        if name == ABORTED:
            assert answer.reason in (FinishReason.ABORTED, FinishReason.LENGTH)
            longer = max(answer.token_ids, undisturbed[name].token_ids, key=len)
            assert answer.token_ids == longer[: len(answer.token_ids)]
            continue
        if name == but:
            continue
        assert told(answer) == told(undisturbed[name]), name
        if exact:
            assert bytes_of(answer) == bytes_of(undisturbed[name]), name
        else:
            assert answer.logprobs == pytest.approx(undisturbed[name].logprobs, abs=1e-5)


class House:
    """The workload in one mode, and what it comes to undisturbed."""

    def __init__(self, model: Vlm, mode: str) -> None:
        self.model, self.mode = model, MODES[mode]
        self.work = Work(model)
        engine = self.engine()
        self.undisturbed = self.work.drive(engine)
        stats = engine.stats()
        assert stats.preemptions_total > 0
        assert stats.prefix_hits_total > 0
        assert (stats.graph_steps_total > 0) == ("recorded" in mode)

    def engine(self) -> Engine:
        return make_engine(self.model, **BOUNDS, **self.mode)

    def disturbed(self, fault: Fault) -> dict[str, Answer]:
        engine = self.engine()
        plant(engine, fault)
        answers = self.work.drive(engine)
        exact = self.mode.get("deterministic", False)
        assert_as_undisturbed(answers, self.undisturbed, exact=exact, but=fault.victim)
        return answers


@pytest.fixture(params=[pytest.param(mode, marks=() if mode in USUAL else pytest.mark.slow) for mode in MODES])
def house(recordable: Vlm, request: pytest.FixtureRequest) -> House:
    return House(recordable, request.param)


@pytest.mark.parametrize("point", POINTS)
def test_E1_E3_the_nth_call_of_a_stage_fails_and_nobody_notices(house: House, point: str) -> None:
    """A fault that doesn't come back has no culprit: everybody gets what they would have got."""
    nth = 0
    while True:
        fault = Fault(point, (failing, out_of_memory)[nth % 2], nth)
        answers = house.disturbed(fault)
        if not fault.fired:
            break
        assert all(answer.reason is not FinishReason.ERROR for answer in answers.values()), nth
        nth += 1
    assert nth > 0


@pytest.mark.parametrize("point", [point for point in POINTS if point != "allocate"])
def test_E1_E3_whom_a_stage_fails_for_ends_alone_by_name(house: House, point: str) -> None:
    rng = random.Random(point)
    for victim in ("look",) if point == "encode" else ("look", "text", "told-off", "long"):
        code = rng.choice(list(ERRORS))
        fault = Fault(point, ERRORS[code], rng.randrange(4) if point != "encode" else 0, victim)
        answers = house.disturbed(fault)
        assert fault.fired, (point, victim)
        finish = answers[victim].finish
        assert finish is not None
        assert (finish.reason, finish.error_code) == (FinishReason.ERROR, code), (point, victim)
        assert finish.error_message
        whole = house.undisturbed[victim].token_ids
        assert answers[victim].token_ids == whole[: len(answers[victim].token_ids)]


@pytest.mark.parametrize("point", ["plan", "batch", "forward"])
def test_E3_a_fault_that_nobody_is_to_blame_for_ends_the_engine(recordable: Vlm, point: str) -> None:
    """Another process takes over. Its requests are told to come again, not that they are at fault."""
    house = House(recordable, "plain")
    engine = house.engine()
    plant(engine, Fault(point, failing, 3, always=True))
    with pytest.raises(RuntimeError, match="planted"):
        house.work.drive(engine)
    assert not [event for event in engine._outbox if isinstance(event, FinishEvent) and event.error_code]


@pytest.mark.parametrize("point", ["allocate", "encode", "sample", "commit", "wait", "record"])
def test_E3_a_fault_that_hits_everybody_ends_everybody_and_then_it_is_over(recordable: Vlm, point: str) -> None:
    work = Work(recordable)
    engine = make_engine(recordable, **BOUNDS, overlap=True)
    plant(engine, Fault(point, failing, 0 if point == "encode" else 3, always=True))
    answers = work.drive(engine)
    assert all(answer.reason for answer in answers.values())
    ended = {name for name, answer in answers.items() if answer.reason is FinishReason.ERROR}
    assert len(ended) > 4 or (point == "encode" and ended == {"look", "choice0", "choice1", "again"})


@pytest.mark.parametrize("error", [torch.AcceleratorError("CUDA error: unspecified launch failure"), AssertionError()])
def test_E4_a_lost_device_and_broken_books_end_the_engine_at_once(tiny: Vlm, error: Exception) -> None:
    def raised() -> Exception:
        return error

    work = Work(tiny)
    engine = make_engine(tiny, **BOUNDS)
    fault = Fault("forward", raised, 2)
    plant(engine, fault)
    with pytest.raises(type(error)):
        work.drive(engine)
    assert fault.calls == 3, "nothing more was asked of it"


def test_E2_numbers_that_are_none_once_change_nothing(house: House) -> None:
    """They may have come out of a cache: computed again from nothing they are what they are."""
    nth = 0
    while True:
        fault = Fault("sample", None, nth)
        answers = house.disturbed(fault)
        if not fault.fired:
            break
        assert all(answer.reason is not FinishReason.ERROR for answer in answers.values()), nth
        nth += 1


@pytest.mark.parametrize("victim", ["look", "told-off", "choice1"])
def test_E2_a_row_whose_logits_are_none_ends_alone(house: House, victim: str) -> None:
    for nth in (0, 3):
        answers = house.disturbed(Fault("sample", None, nth, victim))
        finish = answers[victim].finish
        assert finish is not None
        if "graphs" in house.mode and finish.reason is not FinishReason.ERROR:
            continue
        assert (finish.reason, finish.error_code) == (FinishReason.ERROR, "server_error")
        assert "not finite" in (finish.error_message or "")


@pytest.mark.parametrize("spoiled", ["text", "picture", "infinite picture"])
def test_E2_a_spoiled_input_spoils_neither_caches_nor_mates(
    house: House, monkeypatch: pytest.MonkeyPatch, spoiled: str
) -> None:
    """True NaN through the true model: in keys and values, in blocks that others get next, in recordings."""
    work, model = house.work, house.model
    side = model.config.vision.image_size
    white = picture(side, 1) * 0 + 255
    bad_token = 2
    assert all(bad_token not in request.prompt.token_ids for request in work.requests)
    embed, encode = Vlm.embed, Vlm.encode_images

    def spoil_text(self: Vlm, token_ids_T: torch.Tensor) -> torch.Tensor:
        return embed(self, token_ids_T).masked_fill((token_ids_T == bad_token)[:, None], torch.nan)

    def spoil_picture(self: Vlm, pixels_NYXC: torch.Tensor) -> torch.Tensor:
        bad_N = (pixels_NYXC == 255).flatten(1).all(dim=1)
        wrong = torch.nan if spoiled == "picture" else torch.inf
        return encode(self, pixels_NYXC).masked_fill(bad_N[:, None, None], wrong)

    monkeypatch.setattr(Vlm, "embed", spoil_text)
    monkeypatch.setattr(Vlm, "encode_images", spoil_picture)
    parts: list[Any] = [6, white, 14] if "picture" in spoiled else [20]
    prompt = make_prompt(model, work.album, parts, seed=40)
    if spoiled == "text":
        prompt = type(prompt)((*prompt.token_ids[:11], bad_token, *prompt.token_ids[12:]))
    engine = house.engine()
    bad = [make_request(f"bad{i}", prompt, max_tokens=20, temperature=0.5 * i) for i in range(3)]
    for _ in range(2):
        ends = {request.id: Answer() for request in bad}
        for request in bad:
            engine.add(request)
        # They stand before the others and beside them.
        answers = work.drive(engine, ends=ends)
        assert_as_undisturbed(answers, house.undisturbed, exact=house.mode.get("deterministic", False))
        for answer in ends.values():
            assert answer.finish is not None
            assert answer.token_ids == []
            assert answer.finish.error_code == "server_error"
    # Not a block of theirs can be found, although nobody has taken any since.
    assert run(engine, bad[:1], work.album)["bad0"].reason is FinishReason.ERROR
    sequence = engine._scheduler.add(bad[0])
    assert engine._scheduler._find_prefix(sequence) == []
    assert all(sequence.image_key(span) not in engine._runner._vision for span in prompt.images)


def test_E2_numbers_lost_in_the_middle_of_an_answer_end_it_there(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that one answer alone draws has a spoiled embedding: what follows it, replayed or not, is no number."""
    work, undisturbed, victim = house.work, house.undisturbed, "text"
    known = {token for request in work.requests for token in request.prompt.token_ids}
    known |= {token for name, answer in undisturbed.items() if name != victim for token in answer.token_ids}
    whole = undisturbed[victim].token_ids
    place = next(i for i, token in enumerate(whole[:-1]) if token not in known)
    embed = Vlm.embed

    def spoil(self: Vlm, token_ids_T: torch.Tensor) -> torch.Tensor:
        return embed(self, token_ids_T).masked_fill((token_ids_T == whole[place])[:, None], torch.nan)

    monkeypatch.setattr(Vlm, "embed", spoil)
    answers = work.drive(house.engine())
    assert_as_undisturbed(answers, undisturbed, exact=house.mode.get("deterministic", False), but=victim)
    assert answers[victim].reason is FinishReason.ERROR
    assert answers[victim].token_ids == whole[: place + 1]


def test_E2_a_model_that_gives_no_numbers_at_all_ends_the_engine(tiny: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    logits = Vlm.logits
    monkeypatch.setattr(Vlm, "logits", lambda self, hidden_SD: logits(self, hidden_SD) * torch.nan)
    with pytest.raises(ArithmeticError, match="whatever it computes"):
        Work(tiny).drive(make_engine(tiny, **BOUNDS))


def test_E1_pictures_that_do_not_fit_together_are_encoded_one_by_one(
    tiny: Vlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, passes = Vlm.encode_images, []

    def scarce(self: Vlm, pixels_NYXC: torch.Tensor) -> torch.Tensor:
        passes.append(len(pixels_NYXC))
        if len(pixels_NYXC) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return encode(self, pixels_NYXC)

    album = Album()
    side = tiny.config.vision.image_size
    request = make_request("album", make_prompt(tiny, album, [2, *(picture(side, i) for i in range(3)), 4]))
    expected = run(make_engine(tiny), [request], album)["album"].token_ids
    monkeypatch.setattr(Vlm, "encode_images", scarce)
    assert run(make_engine(tiny), [request], album)["album"].token_ids == expected
    assert passes == [3, 1, 1, 1]


def test_E3_requests_that_fail_only_together_are_all_served(tiny: Vlm) -> None:
    """No one of them is to blame: each trial brings all of them forward."""
    album = Album()
    requests = [make_request(name, make_prompt(tiny, album, [5], seed=len(name)), max_tokens=9) for name in ("a", "bb")]
    expected = run(make_engine(tiny), requests, album)
    engine = make_engine(tiny)
    batch = engine._runner._batch

    def only_apart(slices: Any) -> Any:
        if len(slices) > 1:
            raise RuntimeError("planted")
        return batch(slices)

    engine._runner._batch = only_apart  # type: ignore[method-assign]
    answers = run(engine, requests, album, max_steps=200)
    assert {name: told(answer) for name, answer in answers.items()} == {
        name: told(answer) for name, answer in expected.items()
    }


def test_E3_a_step_whose_requests_all_have_gone_fails_for_nobody(tiny: Vlm) -> None:
    work = Work(tiny)
    engine = make_engine(tiny, **BOUNDS, overlap=True)
    plant(engine, Fault("wait", failing, 1))
    answers = {"text": Answer()}
    engine.add(work.first[0])
    for _ in range(2):
        run_step(engine, work.album, answers)
    engine.abort("text")
    while engine.has_work:
        run_step(engine, work.album, answers)
    assert answers["text"].reason is FinishReason.ABORTED
    assert_nothing_held(engine)


@pytest.mark.parametrize("mode", ["plain", "late"])
def test_E3_a_request_that_is_aborted_frees_its_place_within_one_step(tiny: Vlm, mode: str) -> None:
    """In whatever state it is; on trial as well."""
    work = Work(tiny)
    for turn in range(12):
        engine = make_engine(tiny, **(BOUNDS | {"max_running": 1}), **MODES[mode])
        plant(engine, Fault("forward", failing, 4))
        answers = {name: Answer() for name in ("gone", "next")}
        engine.add(make_request("gone", work.first[0].prompt, max_tokens=50))
        engine.add(make_request("next", work.first[5].prompt, max_tokens=50))
        for _ in range(turn):
            run_step(engine, work.album, answers)
        engine.abort("gone")
        engine.check_integrity()
        # Its trial, if it stood there, is over with the step that notices.
        run_step(engine, work.album, answers)
        if [sequence.id for sequence in engine._scheduler.running] != ["next"]:
            run_step(engine, work.album, answers)
        assert [sequence.id for sequence in engine._scheduler.running] == ["next"], turn


def test_E2_a_replayed_row_whose_logits_are_none_ends_there(recordable: Vlm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Among rows that all take their token from the recording itself."""
    album = Album()
    requests = [make_request(f"r{i}", make_prompt(recordable, album, [5], seed=i), max_tokens=9) for i in range(3)]
    expected = run(make_engine(recordable, graphs=True), requests, album)
    whole = expected["r0"].token_ids
    others = {token for name in ("r1", "r2") for token in expected[name].token_ids}
    others |= {token for request in requests for token in request.prompt.token_ids}
    place = next(i for i, token in enumerate(whole[:-1]) if token not in others and token not in whole[:i])
    embed = Vlm.embed

    def spoil(self: Vlm, token_ids_T: torch.Tensor) -> torch.Tensor:
        return embed(self, token_ids_T).masked_fill((token_ids_T == whole[place])[:, None], torch.nan)

    monkeypatch.setattr(Vlm, "embed", spoil)
    engine = make_engine(recordable, graphs=True)
    answers = run(engine, requests, album)
    assert engine.stats().graph_steps_total > 0
    assert answers["r0"].reason is FinishReason.ERROR
    assert answers["r0"].token_ids == whole[: place + 1]
    for name in ("r1", "r2"):
        assert told(answers[name]) == told(expected[name])


def test_E3_a_full_batch_that_is_put_back_leaves_the_queue_its_room(tiny: Vlm) -> None:
    album = Album()
    engine = make_engine(tiny, max_running=6, max_queue=2)
    answers = {f"r{i}": Answer() for i in range(6)}
    for i, name in enumerate(answers):
        engine.add(make_request(name, make_prompt(tiny, album, [5], seed=i), max_tokens=8))
        run_step(engine, album, answers)
    plant(engine, Fault("forward", failing))
    run_step(engine, album, answers)
    assert (engine.stats().running, engine.stats().waiting) == (6, 0)
    late = {"late0": Answer(), "late1": Answer(), "late2": Answer()}
    for name in late:
        engine.add(make_request(name, make_prompt(tiny, album, [4], seed=9), max_tokens=2))
    assert engine.stats().waiting == 2
    while engine.has_work:
        run_step(engine, album, answers | late)
    assert [len(answer.token_ids) for answer in answers.values()] == [8] * 6
    assert [answer.finish and answer.finish.error_code for answer in late.values()] == [
        None,
        None,
        "server_is_overloaded",
    ]
    assert_nothing_held(engine)
