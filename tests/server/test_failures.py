"""What the engine does wrong, and when there is no room: the right status, or an error event and no end mark."""

from typing import Any

import openai
import pytest
from api_calls import CHAT, chat_body, events, eventually, http, openai_client
from fakes import FakeEngine, fake_app

from sightline_server.engine.types import EngineStats

# Code of the engine, status, code of the answer, whether the client may try again.
FAILURES: list[tuple[str, int, str, str | None]] = [
    ("engine_restarting", 503, "engine_restarting", None),
    ("server_shutting_down", 503, "server_shutting_down", None),
    ("request_crashed_engine", 503, "request_crashed_engine", "false"),
    ("server_is_overloaded", 503, "server_is_overloaded", None),
    ("engine_oom", 503, "engine_oom", "false"),
    ("context_length_exceeded", 400, "context_length_exceeded", None),
    ("image_parse_error", 400, "image_parse_error", None),
    ("server_error", 500, "server_error", None),
    ("something new", 500, "server_error", None),
]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("code", "status", "told", "retry"), FAILURES, ids=[row[0] for row in FAILURES])
async def test_failures_before_the_first_token(
    code: str, status: int, told: str, retry: str | None, stream: bool
) -> None:
    engine = FakeEngine()
    engine.fail_after, engine.error = 0, (code, None)
    async with http(fake_app(engine)) as client:
        answer = await client.post(CHAT, json=chat_body(stream=stream, n=2))
    assert answer.status_code == status
    assert answer.json()["error"]["code"] == told
    assert answer.headers.get("x-should-retry") == retry
    assert ("retry-after" in answer.headers) is (status == 503 and retry is None)
    assert engine.live == set()


@pytest.mark.parametrize(("code", "status", "told", "retry"), FAILURES, ids=[row[0] for row in FAILURES])
async def test_O12_failures_in_the_middle(code: str, status: int, told: str, retry: str | None) -> None:
    engine = FakeEngine("abcdef")
    engine.fail_after, engine.error = 3, (code, None)
    # A pause, so that the first tokens are out before the failure.
    engine.pause_after = 3
    async with http(fake_app(engine)) as client:
        engine.step_s = 0.001
        engine.go_on.set()
        answer = await client.post(CHAT, json=chat_body(stream=True))
        whole = await client.post(CHAT, json=chat_body())
    assert answer.status_code == 200
    *chunks, last = events(answer.text)
    assert "".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks) == "abc"
    assert last["error"]["code"] == told
    assert set(last["error"]) == {"message", "type", "param", "code"}
    assert "[DONE]" not in answer.text
    assert whole.status_code == status


async def test_the_client_raises_an_error_event() -> None:
    engine = FakeEngine("abcdef")
    engine.fail_after, engine.error, engine.step_s = 3, ("engine_restarting", None), 0.001
    stream = await openai_client(fake_app(engine)).chat.completions.create(
        model="fake", messages=[{"role": "user", "content": "Hi"}], stream=True
    )
    with pytest.raises(openai.APIError, match="restarting"):
        async for _ in stream:
            pass


async def test_one_choice_that_fails_ends_them_all() -> None:
    engine = FakeEngine(lambda request: "x" if request.sampling.choice else "much longer")
    engine.fail_after = 2
    async with http(fake_app(engine)) as client:
        answer = await client.post(CHAT, json=chat_body(n=2))
    assert answer.status_code == 500
    await eventually(lambda: not engine.live)


@pytest.mark.parametrize("stream", [False, True])
async def test_our_own_bug_says_nothing(stream: bool, caplog: pytest.LogCaptureFixture) -> None:
    engine = FakeEngine()
    engine.crash = RuntimeError("secret at 0x7f00")
    async with http(fake_app(engine)) as client:
        answer = await client.post(CHAT, json=chat_body(stream=stream))
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "server_error"
    assert "0x" not in answer.text
    assert "secret" not in answer.text


async def test_a_bug_in_a_route(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise ValueError("".join(["quo", "tes"]))

    monkeypatch.setattr("sightline_server.routes.chat.build_prompt", broken)
    async with http(fake_app()) as client:
        answer = await client.post(CHAT, json=chat_body())
    assert answer.status_code == 500
    assert answer.headers["x-request-id"]
    assert answer.json()["error"]["code"] == "server_error"
    assert "quotes" not in answer.text + caplog.text
    assert "in broken" in caplog.text


@pytest.mark.parametrize(("loaded", "code"), [(False, "engine_starting"), (True, "engine_restarting")])
async def test_an_engine_that_is_not_there(loaded: bool, code: str) -> None:
    engine = FakeEngine()
    engine.become(ready=False, loaded=loaded)
    async with http(fake_app(engine)) as client:
        answer = await client.post(CHAT, content=b"not even read")
        ready, health = await client.get("/ready"), await client.get("/health")
        models = await client.get("/v1/models")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, code)
    assert int(answer.headers["retry-after"]) > 0
    assert (ready.status_code, ready.json()) == (503, {"status": "restarting" if loaded else "starting"})
    assert (health.status_code, health.json()) == (200, {"status": "ok"})
    assert models.status_code == 200


async def test_O1_a_full_queue_is_told_before_the_body_is_read() -> None:
    engine = FakeEngine()
    engine.become(stats=EngineStats(waiting=5))
    async with http(fake_app(engine, max_queue=5)) as client:
        answer = await client.post(CHAT, content=b"not even read")
        engine.become(stats=EngineStats(waiting=4))
        room = await client.post(CHAT, json=chat_body())
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_is_overloaded")
    assert answer.headers["retry-after"]
    assert room.status_code == 200


async def test_draining() -> None:
    app = fake_app()
    app.state.draining = True
    async with http(app) as client:
        chat, models = await client.post(CHAT, json=chat_body()), await client.get("/v1/models")
        ready, health = await client.get("/ready"), await client.get("/health")
    for answer in (chat, models):
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "server_is_draining")
        assert answer.headers["retry-after"]
    assert (ready.status_code, ready.json()) == (503, {"status": "draining"})
    assert health.status_code == 200
