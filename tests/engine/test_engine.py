"""The engine driven directly: every request ends once, for the right reason, and leaves nothing behind."""

from typing import Any

import numpy as np
import pytest
import torch
from engines import Album, Answer, digest_of, make_engine, make_prompt, make_request, picture, run, run_step

from sightline_models.vlm import Vlm
from sightline_server.engine.engine import Engine
from sightline_server.engine.types import FinishReason, ImageSpan, PixelsWanted, Prompt, Request


def image_of(model: Vlm, seed: int) -> "np.ndarray[tuple[int, int, int], np.dtype[np.uint8]]":
    return picture(model.config.vision.image_size, seed)


def mixed_requests(model: Vlm, album: Album, count: int, **params: Any) -> list[Request]:
    """Requests with none, one and three pictures and texts of different lengths."""
    requests = []
    for i in range(count):
        parts: list[Any] = [3 + i]
        for j in range((0, 1, 3)[i % 3]):
            parts += [image_of(model, 100 * i + j), 1 + j]
        requests.append(make_request(f"r{i}", make_prompt(model, album, parts, seed=i), **params))
    return requests


def test_a_request_gets_its_tokens_and_one_end(tiny: Vlm) -> None:
    album = Album()
    request = make_request("a", make_prompt(tiny, album, [4, image_of(tiny, 1), 5]), max_tokens=6)
    answer = run(make_engine(tiny), [request], album)["a"]
    assert len(answer.token_ids) == 6
    assert answer.reason is FinishReason.LENGTH
    assert answer.finish is not None
    usage = answer.finish.usage
    assert usage.prompt_tokens == 9 + tiny.config.num_image_tokens
    assert (usage.completion_tokens, usage.image_tokens, usage.cached_tokens) == (6, tiny.config.num_image_tokens, 0)


def test_a_stop_token_ends_unseen_and_is_counted(tiny: Vlm) -> None:
    album = Album()
    prompt = make_prompt(tiny, album, [7])
    free = run(make_engine(tiny), [make_request("a", prompt, max_tokens=5)], album)["a"].token_ids
    stop = free[2]
    first = free.index(stop)
    answer = run(make_engine(tiny), [make_request("a", prompt, max_tokens=5, stop_token_ids=(stop,))], album)["a"]
    assert answer.token_ids == free[:first]
    assert answer.reason is FinishReason.STOP
    assert answer.finish is not None
    assert answer.finish.usage.completion_tokens == first + 1


def test_min_tokens_holds_the_stop_off(tiny: Vlm) -> None:
    album = Album()
    prompt = make_prompt(tiny, album, [7])
    free = run(make_engine(tiny), [make_request("a", prompt, max_tokens=1)], album)["a"].token_ids
    answer = run(
        make_engine(tiny), [make_request("a", prompt, max_tokens=4, min_tokens=4, stop_token_ids=(free[0],))], album
    )["a"]
    assert len(answer.token_ids) == 4
    assert free[0] not in answer.token_ids


def test_the_context_ends_an_answer(tiny: Vlm) -> None:
    album = Album()
    request = make_request("a", make_prompt(tiny, album, [10]), max_tokens=1000)
    answer = run(make_engine(tiny, max_model_len=16), [request], album)["a"]
    assert len(answer.token_ids) == 6
    assert answer.reason is FinishReason.LENGTH


@pytest.mark.parametrize(
    ("length", "bounds", "code"),
    [(40, {"max_model_len": 40}, "context_length_exceeded"), (0, {}, "invalid_value")],
)
def test_what_cannot_run_is_refused_by_an_event(tiny: Vlm, length: int, bounds: dict[str, int], code: str) -> None:
    request = make_request("a", Prompt((5,) * length))
    answer = run(make_engine(tiny, **bounds), [request], Album())["a"]
    assert answer.reason is FinishReason.ERROR
    assert answer.finish is not None
    assert answer.finish.error_code == code
    assert answer.finish.error_message


def test_O1_a_full_queue_refuses_and_the_rest_is_served(tiny: Vlm) -> None:
    album = Album()
    requests = [make_request(f"r{i}", make_prompt(tiny, album, [4], seed=i)) for i in range(5)]
    answers = run(make_engine(tiny, max_queue=3), requests, album)
    reasons = [answers[request.id].reason for request in requests]
    assert reasons == [FinishReason.LENGTH] * 3 + [FinishReason.ERROR] * 2
    refused = answers["r4"].finish
    assert refused is not None
    assert refused.error_code == "server_is_overloaded"


def test_O5_an_abort_frees_at_once_wherever_the_request_is(tiny: Vlm) -> None:
    album = Album()
    engine = make_engine(tiny, max_running=2, max_step_tokens=64)
    answers = {}
    for request in mixed_requests(tiny, album, 6, max_tokens=50):
        answers[request.id] = Answer()
        engine.add(request)
    engine.abort("r5")
    engine.check_integrity()
    for _ in range(4):
        run_step(engine, album, answers)
    for name in answers:
        engine.abort(name)
        engine.check_integrity()
    engine.abort("nobody")
    run_step(engine, album, answers)
    assert {answer.reason for answer in answers.values()} == {FinishReason.ABORTED}
    assert engine.stats().blocks_used == 0
    assert not engine.has_work


def test_an_image_that_cannot_be_had_ends_its_request_alone(tiny: Vlm) -> None:
    album = Album()
    engine = make_engine(tiny)
    lost = make_request(
        "lost",
        Prompt((4,) * tiny.config.num_image_tokens + (5,), (ImageSpan(0, tiny.config.num_image_tokens, b"?" * 32),)),
    )
    fine = make_request("fine", make_prompt(tiny, album, [4]))
    answers = {"lost": Answer(), "fine": Answer()}
    engine.add(lost)
    engine.add(fine)
    assert PixelsWanted("lost", b"?" * 32) in engine.step()
    engine.fail_image("lost", b"?" * 32, "image_parse_error", "Image 0 can't be decoded.")
    while engine.has_work:
        run_step(engine, album, answers)
    assert answers["lost"].finish is not None
    assert answers["lost"].finish.error_code == "image_parse_error"
    assert answers["fine"].reason is FinishReason.LENGTH
    engine.check_integrity()


def test_pixels_are_asked_for_once_and_again_only_when_the_one_asked_is_gone(tiny: Vlm) -> None:
    album = Album()
    engine = make_engine(tiny)
    prompt = make_prompt(tiny, album, [image_of(tiny, 1), 5])
    answers = {name: Answer() for name in "abc"}
    for name in answers:
        engine.add(make_request(name, prompt))
    events = engine.step()
    assert [event.request_id for event in events] == ["a"]
    assert not engine.has_work
    engine.abort("a")
    events = engine.step()
    assert [event.request_id for event in events] == ["a", "b"]
    engine.provide("b", prompt.images[0].digest, album.pixels[prompt.images[0].digest])
    while engine.has_work:
        run_step(engine, album, answers)
    assert answers["b"].token_ids == answers["c"].token_ids != []
    assert album.asked == []
    assert engine.stats().images_encoded_total == 1
    engine.check_integrity()


def test_batch_mates_and_chunks_and_caches_do_not_change_greedy_answers(tiny: Vlm) -> None:
    album = Album()
    requests = mixed_requests(tiny, album, 9, max_tokens=10)
    alone = {request.id: run(make_engine(tiny), [request], album)[request.id].token_ids for request in requests}
    for bounds in (
        {},
        {"max_step_tokens": 7},
        {"prefix_caching": False, "encoder_cache_bytes": 0},
        {"num_blocks": 40, "max_model_len": 160},
        {"block_size": 16, "num_blocks": 64},
    ):
        engine = make_engine(tiny, **bounds)
        for _ in range(2):
            answers = run(engine, requests, album)
            assert {name: answer.token_ids for name, answer in answers.items()} == alone, bounds


def test_preemption_happens_and_changes_nothing(tiny: Vlm) -> None:
    album = Album()
    requests = mixed_requests(tiny, album, 6, max_tokens=40, temperature=1.0, seed=7)
    roomy, tight = make_engine(tiny), make_engine(tiny, num_blocks=44, max_model_len=170)
    expected, got = run(roomy, requests, album), run(tight, requests, album)
    assert roomy.stats().preemptions_total == 0
    assert tight.stats().preemptions_total > 0
    assert {name: answer.token_ids for name, answer in got.items()} == {
        name: answer.token_ids for name, answer in expected.items()
    }


def test_a_seed_survives_and_choices_differ(tiny: Vlm) -> None:
    album = Album()
    prompt = make_prompt(tiny, album, [6])
    requests = [make_request(f"c{i}", prompt, temperature=1.0, seed=11, choice=i, max_tokens=12) for i in range(3)]
    together = run(make_engine(tiny), requests, album)
    alone = run(make_engine(tiny), requests[1:2], album)
    assert together["c1"].token_ids == alone["c1"].token_ids
    assert len({tuple(answer.token_ids) for answer in together.values()}) == 3
    reseeded = run(
        make_engine(tiny), [make_request("c1", prompt, temperature=1.0, seed=12, choice=1, max_tokens=12)], album
    )
    assert reseeded["c1"].token_ids != alone["c1"].token_ids


def test_a_second_question_about_a_picture_computes_the_question_alone(tiny: Vlm) -> None:
    album = Album()
    engine = make_engine(tiny)
    look = image_of(tiny, 3)
    run(engine, [make_request("a", make_prompt(tiny, album, [2, look, 5], seed=1))], album)
    first = make_prompt(tiny, album, [2, look, 5], seed=1)
    question = Prompt((*first.token_ids[:-5], 9, 8, 7, 6, 5, 4), first.images)
    before = len(album.asked)
    answer = run(engine, [make_request("b", question)], album)["b"]
    assert answer.finish is not None
    assert answer.finish.usage.cached_tokens >= tiny.config.num_image_tokens - 4
    assert len(album.asked) == before
    cold = run(make_engine(tiny, prefix_caching=False, encoder_cache_bytes=0), [make_request("b", question)], album)
    assert answer.token_ids == cold["b"].token_ids


def test_one_picture_after_different_texts_is_encoded_once(tiny: Vlm) -> None:
    album = Album()
    engine = make_engine(tiny)
    look = image_of(tiny, 3)
    for i in range(3):
        run(engine, [make_request(f"r{i}", make_prompt(tiny, album, [2 + i, look, 5], seed=i))], album)
    stats = engine.stats()
    assert (stats.images_encoded_total, stats.encoder_queries_total, stats.encoder_hits_total) == (1, 3, 2)
    assert len(album.asked) == 1


def test_K9_tenants_do_not_see_each_others_pictures_or_prefixes(tiny: Vlm) -> None:
    album = Album()
    engine = make_engine(tiny)
    prompt = make_prompt(tiny, album, [image_of(tiny, 3), 9])
    for salt in (b"one", b"two"):
        answer = run(engine, [make_request(salt.decode(), prompt, cache_salt=salt)], album)[salt.decode()]
        assert answer.finish is not None
        assert answer.finish.usage.cached_tokens == 0
    assert engine.stats().images_encoded_total == 2


def test_pictures_that_differ_in_one_corner_or_in_order_get_their_own_answers(tiny: Vlm) -> None:
    album = Album()
    engine = make_engine(tiny)
    one = image_of(tiny, 3)
    other = one.copy()
    other[:2, :2] = 255 - other[:2, :2]

    def logprobs(*pictures: Any) -> list[float | None]:
        request = make_request("x", make_prompt(tiny, album, [2, *pictures, 5], seed=1), max_tokens=1, logprobs=True)
        warm = run(engine, [request], album)["x"].logprobs
        cold = run(make_engine(tiny), [request], album)["x"].logprobs
        assert warm == pytest.approx(cold, abs=1e-5)
        return warm

    assert len({round(logprobs(*pictures)[0] or 0.0, 7) for pictures in ((one, one), (one, other), (other, one))}) == 3


def test_a_step_that_runs_out_of_memory_ends_its_largest_request_alone(
    tiny: Vlm, monkeypatch: pytest.MonkeyPatch
) -> None:
    album = Album()
    engine = make_engine(tiny)
    true_forward = Vlm.forward

    def scarce(self: Vlm, hidden_TD: torch.Tensor, *rest: Any) -> torch.Tensor:
        if hidden_TD.shape[0] > 60:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return true_forward(self, hidden_TD, *rest)

    monkeypatch.setattr(Vlm, "forward", scarce)
    requests = [
        make_request("small", make_prompt(tiny, album, [5])),
        make_request("huge", make_prompt(tiny, album, [80])),
    ]
    answers = run(engine, requests, album)
    assert answers["small"].reason is FinishReason.LENGTH
    huge = answers["huge"].finish
    assert huge is not None
    assert huge.error_code == "engine_oom"


def test_interactive_requests_pass_waiting_batch_work(tiny: Vlm) -> None:
    album = Album()
    engine = make_engine(tiny, max_running=1)
    answers = {}
    for name, priority in (("batch1", 1), ("batch2", 1), ("now", 0)):
        answers[name] = Answer()
        engine.add(make_request(name, make_prompt(tiny, album, [4], seed=len(name)), priority=priority, max_tokens=3))
    ended: list[str] = []
    while engine.has_work:
        run_step(engine, album, answers)
        ended += [name for name, answer in answers.items() if answer.finish and name not in ended]
    assert ended == ["now", "batch1", "batch2"]


def deterministic(model: Vlm, **bounds: Any) -> Engine:
    return make_engine(model, deterministic=True, **bounds)


def canary_bytes(answers: dict[str, Answer]) -> list[tuple[int, float | None]]:
    answer = answers["canary"]
    return list(zip(answer.token_ids, answer.logprobs, strict=True))


def test_deterministic_mode_gives_equal_bytes_whatever_else_runs(tiny: Vlm) -> None:
    album = Album()
    canary = make_request(
        "canary",
        make_prompt(tiny, album, [9, image_of(tiny, 5), 21], seed=5),
        max_tokens=24,
        temperature=0.8,
        seed=3,
        logprobs=True,
        top_logprobs=3,
        top_p=0.9,
    )
    expected = canary_bytes(run(deterministic(tiny), [canary], album))
    mates = mixed_requests(tiny, album, 9, max_tokens=30, temperature=1.0, seed=1, logprobs=True)
    for bounds in ({}, {"max_step_tokens": 7}, {"num_blocks": 60, "max_model_len": 240}, {"prefix_caching": False}):
        engine = deterministic(tiny, **bounds)
        for position in (0, 5, 9):
            requests = [*mates[:position], canary, *mates[position:]]
            assert canary_bytes(run(engine, requests, album)) == expected, bounds


def test_deterministic_mode_agrees_with_the_plain_one(tiny: Vlm) -> None:
    album = Album()
    requests = mixed_requests(tiny, album, 4, max_tokens=8, logprobs=True)
    plain, strict = run(make_engine(tiny), requests, album), run(deterministic(tiny), requests, album)
    for name, answer in plain.items():
        assert strict[name].token_ids == answer.token_ids
        assert strict[name].logprobs == pytest.approx(answer.logprobs, abs=1e-4)


def test_the_digest_of_a_test_picture_tells_pictures_apart() -> None:
    assert digest_of(picture(8, 1)) != digest_of(picture(8, 2))
