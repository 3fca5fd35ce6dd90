"""Ways to call the app in tests: in-process, through the true ``openai`` client, and over a true socket."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
from fakes import ALIAS
from fastapi import FastAPI
from openai import AsyncOpenAI

from sightline_server.cli.lifetime import HttpServer, listen

CHAT = "/v1/chat/completions"


def chat_body(**fields: Any) -> dict[str, Any]:
    return {"model": ALIAS, "messages": [{"role": "user", "content": "Hi"}], **fields}


def http(app: FastAPI, **options: Any) -> httpx.AsyncClient:
    """Calls ``app`` in this process. Waits for the whole answer, also when it is a stream."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost", **options)


def openai_client(app: FastAPI, **options: Any) -> AsyncOpenAI:
    """The true client, which checks every answer against OpenAI's types."""
    return AsyncOpenAI(
        base_url="http://localhost/v1",
        http_client=http(app),
        max_retries=0,
        _strict_response_validation=True,
        **({"api_key": "any"} | options),
    )


def events(text: str) -> list[Any]:
    """The data of a stream, by the narrowest rules: one line each, then one blank line, comments skipped."""
    found = []
    for block in text.split("\n\n")[:-1]:
        lines = [line for line in block.split("\n") if not line.startswith(":")]
        assert len(lines) == 1, f"an event of {len(lines)} lines: {lines}"
        assert lines[0].startswith("data: "), lines
        data = lines[0].removeprefix("data: ")
        found.append(data if data == "[DONE]" else json.loads(data))
    return found


@contextmanager
def running(app: FastAPI) -> Iterator[str]:
    """Serve ``app`` as `sightline serve` does, on a socket, from a thread of its own; gives its address."""
    listener = listen("127.0.0.1", 0)
    server = HttpServer(app, app.state.context.settings)
    server.config.timeout_graceful_shutdown = 1
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            threading.Event().wait(0.005)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


async def eventually(true: Any, *, seconds: float = 2.0) -> None:
    """Waits until ``true()`` holds."""
    deadline = asyncio.get_running_loop().time() + seconds
    while not true():
        assert asyncio.get_running_loop().time() < deadline, "it did not become true"
        await asyncio.sleep(0.005)
