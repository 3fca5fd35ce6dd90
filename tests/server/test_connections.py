"""Over a true socket: who leaves frees the engine at once, silence is kept alive, bodies have limits."""

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest
from api_calls import CHAT, chat_body, eventually, running
from fakes import FakeEngine, fake_app, fake_image, fake_model

from sightline_server.chat.prompt import build_prompt


def wait_until(true: Any, seconds: float = 3.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it did not become true"
        time.sleep(0.005)


@contextmanager
def post(address: str, body: bytes, *, headers: str = "", length: int | None = None) -> Iterator[socket.socket]:
    """An open connection with a chat request on it."""
    host, port = address.removeprefix("http://").split(":")
    size = f"Content-Length: {len(body) if length is None else length}\r\n" if "chunked" not in headers else ""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{size}{headers}\r\n"
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(head.encode() + body)
        yield connection


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    answer = b""
    while mark not in answer:
        part = connection.recv(4096)
        assert part, f"closed after {answer!r}"
        answer += part
    return answer


@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [0, 4])
def test_O5_leaving_frees_the_engine(stream: bool, after: int, choices: int) -> None:
    engine = FakeEngine("0123456789")
    engine.pause_after = after
    app = fake_app(engine)
    with running(app) as address:
        with post(address, json.dumps(chat_body(stream=stream, n=choices)).encode()) as connection:
            wait_until(lambda: len(engine.live) == choices)
            if stream and after:
                read_until(connection, b'"content":"0123"')
        wait_until(lambda: not engine.live, seconds=1.0)
        assert len(engine.aborted) == choices
        metrics = httpx.get(address + "/metrics").text
    assert 'sightline_requests_total{endpoint="chat",outcome="cancelled"} 1.0' in metrics


def test_O5_leaving_before_the_prompt_is_ready(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on = threading.Event(), threading.Event()
    engine = FakeEngine()

    def slow(*_: Any) -> None:
        entered.set()
        go_on.wait(5)

    monkeypatch.setattr("sightline_server.routes.chat.build_prompt", slow)
    with running(fake_app(engine)) as address:
        with post(address, json.dumps(chat_body()).encode()):
            assert entered.wait(3)
        wait_until(lambda: 'outcome="cancelled"} 1.0' in httpx.get(address + "/metrics").text)
        go_on.set()
    assert engine.requests == []


def test_requests_in_preparation_fill_the_queue_too(monkeypatch: pytest.MonkeyPatch) -> None:
    entered, go_on = threading.Event(), threading.Event()

    def slow(*arguments: Any) -> Any:
        entered.set()
        go_on.wait(5)
        return build_prompt(*arguments)

    monkeypatch.setattr("sightline_server.routes.chat.build_prompt", slow)
    with running(fake_app(max_queue=1)) as address, post(address, json.dumps(chat_body()).encode()) as first:
        assert entered.wait(3)
        refused = httpx.post(address + CHAT, json=chat_body())
        go_on.set()
        assert read_until(first, b"}}").startswith(b"HTTP/1.1 200")
        later = httpx.post(address + CHAT, json=chat_body())
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "server_is_overloaded")
    assert later.status_code == 200


def test_leaving_right_after_the_finish_is_no_failure() -> None:
    engine = FakeEngine("abc")
    with running(fake_app(engine)) as address:
        with httpx.stream("POST", address + CHAT, json=chat_body(stream=True)) as answer:
            for line in answer.iter_lines():
                if '"finish_reason":"stop"' in line:
                    break
        wait_until(lambda: 'endpoint="chat",outcome="completed"} 1.0' in httpx.get(address + "/metrics").text)


def test_silence_is_kept_alive() -> None:
    engine = FakeEngine("abcdef")
    engine.pause_after = 3
    app = fake_app(engine, sse_keep_alive_s=0.05)
    raw = b""
    with running(app) as address, httpx.stream("POST", address + CHAT, json=chat_body(stream=True)) as answer:
        for part in answer.iter_raw():
            raw += part
            if raw.count(b": keep-alive\n") >= 2:
                engine.go_on.set()
    assert b": keep-alive\n\n" not in raw
    assert raw.endswith(b"data: [DONE]\n\n")
    texts = [json.loads(line[6:]) for line in raw.split(b"\n") if line.startswith(b"data: {")]
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in texts) == "abcdef"


def test_headers_go_out_before_a_late_first_token() -> None:
    engine = FakeEngine("abc")
    engine.pause_after = 0
    app = fake_app(engine, sse_keep_alive_s=0.05)
    with running(app) as address, httpx.stream("POST", address + CHAT, json=chat_body(stream=True)) as answer:
        lines = answer.iter_lines()
        assert '"role":"assistant"' in next(lines)
        engine.go_on.set()
        assert "data: [DONE]" in list(lines)


def test_O8_I16_a_body_that_is_announced_too_large_is_not_read() -> None:
    with running(fake_app(max_body_mb=1)) as address, post(address, b"", length=200 * 2**20) as connection:
        answer = read_until(connection, b"}}")
        assert answer.startswith(b"HTTP/1.1 413")
        assert b'"code":"request_too_large"' in answer
        assert b"connection: close" in answer.lower()
        # What a client is still sending is dropped for a while, within bounds, so that it gets to read this.
        sent = 0
        with suppress(OSError):
            while sent < 64 * 2**20:
                connection.sendall(b"x" * 65536)
                sent += 65536
        assert sent < 16 * 2**20, "two limits, and what fits into the buffers of the two sockets"


def test_O8_a_client_sees_why_its_large_body_is_refused() -> None:
    with running(fake_app(max_body_mb=1)) as address:
        answer = httpx.post(
            address + CHAT, content=b"x" * (2**20 + 2**19), headers={"Content-Type": "application/json"}
        )
    assert answer.status_code == 413
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert str(2**20) in answer.json()["error"]["message"]


def test_O8_a_chunked_body_without_end() -> None:
    chunked = "Transfer-Encoding: chunked\r\n"
    with running(fake_app(max_body_mb=0.1)) as address, post(address, b"", headers=chunked) as connection:
        for _ in range(3):
            connection.sendall(b"10000\r\n" + b"x" * 65536 + b"\r\n")
        assert read_until(connection, b"}}").startswith(b"HTTP/1.1 413")


def test_O3_a_body_that_never_arrives() -> None:
    with running(fake_app(body_timeout_s=0.2)) as address, post(address, b'{"model":', length=100) as connection:
        answer = read_until(connection, b"}}")
    assert answer.startswith(b"HTTP/1.1 408")
    assert b'"code":"request_timeout"' in answer


def test_a_large_body_does_not_take_seconds() -> None:
    body = json.dumps(chat_body(messages=[{"role": "user", "content": [fake_image(bytes(36 * 2**20))]}]))
    with running(fake_app(max_image_mb=64)) as address:
        started = time.monotonic()
        answer = httpx.post(address + CHAT, content=body, headers={"Content-Type": "application/json"}, timeout=30)
        seconds = time.monotonic() - started
    assert answer.status_code == 200
    assert seconds < 5, "ten times what it takes on a slow machine"


async def test_streams_run_side_by_side() -> None:
    engine = FakeEngine(lambda request: bytes(request.prompt.token_ids[-3:]).decode() * 20)
    app = fake_app(engine, model=fake_model())
    with running(app) as address:
        async with httpx.AsyncClient(timeout=30) as client:

            async def one(name: str) -> str:
                body = chat_body(messages=[{"role": "user", "content": name}], stream=True)
                text = ""
                async with client.stream("POST", address + CHAT, json=body) as answer:
                    async for line in answer.aiter_lines():
                        if line.startswith("data: {"):
                            text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
                return text

            names = [f"{index:03}" for index in range(40)]
            assert await asyncio.gather(*map(one, names)) == [name * 20 for name in names]
            await eventually(lambda: not engine.live)
