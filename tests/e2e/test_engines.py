"""Two engines behind one server, as an operator and clients meet them: true processes, one killed under load."""

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

StartServer = Callable[..., Any]

TINY = ("--random", "tiny", "--device", "cpu", "--engines", "2", "--deterministic", "--cpu-cache-gb", "0.05")
TOKENS = 400


def body(text: str, **fields: Any) -> dict[str, Any]:
    common = {"model": "random-tiny", "temperature": 0, "seed": 5, "max_tokens": TOKENS, "ignore_eos": True}
    return common | {"messages": [{"role": "user", "content": text}]} | fields


def metrics(server: Any) -> dict[str, float]:
    text = httpx.get(server.url + "/metrics").text
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.labels
    }


async def ask(http: httpx.AsyncClient, text: str, **fields: Any) -> str:
    answer = await http.post("/v1/chat/completions", json=body(text, **fields))
    assert answer.status_code == 200, answer.text
    said: str = answer.json()["choices"][0]["message"]["content"]
    return said


async def stream(http: httpx.AsyncClient, text: str) -> tuple[str, str]:
    """How a stream ended, and what it said."""
    async with http.stream("POST", "/v1/chat/completions", json=body(text, stream=True)) as answer:
        assert answer.status_code == 200, await answer.aread()
        data = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line.startswith("data: ")]
    if data[-1] != "[DONE]":
        assert sum("error" in json.loads(item) for item in data) == 1
        return json.loads(data[-1])["error"]["code"], ""
    said = "".join(json.loads(item)["choices"][0]["delta"].get("content", "") for item in data[:-1])
    return "done", said


async def until(condition: Callable[[], bool], what: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


@pytest.fixture
def server(start_server: StartServer) -> Any:
    started = start_server(*TINY)
    started.wait_until_told_ready()
    return started


async def test_E4_an_engine_killed_under_load_costs_its_own_requests_and_the_server_stays_ready(server: Any) -> None:
    assert "device     cpu (" in server.stdout
    assert ", 2 engines" in server.stdout
    victim, survivor = (child.pid for child in server.children("engine.worker"))
    assert metrics(server)["sightline_engine_ready"] == 2
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
        quiet = await ask(http, "What does the canary see?")
        streams = [asyncio.create_task(stream(http, f"Number {index} tells a long story.")) for index in range(12)]
        await until(lambda: metrics(server)["sightline_requests_running"] == 12, "the streams never ran")
        before = metrics(server)
        os.kill(victim, signal.SIGKILL)
        await until(lambda: metrics(server)["sightline_engine_ready"] == 1, "the death was not noticed")
        assert server.status("/ready") == 200
        # Bytes are the same alone and beside others, and at whichever engine.
        assert await ask(http, "What does the canary see?") == quiet
        outcomes = await asyncio.gather(*streams)
        counts = Counter(how for how, _ in outcomes)
        assert set(counts) <= {"done", "engine_restarting"}
        assert (counts["done"], counts["engine_restarting"]) == (6, 6)
        after = metrics(server)
        assert after["sightline_generated_tokens_total"] > before["sightline_generated_tokens_total"]
        await until(lambda: metrics(server)["sightline_engine_ready"] == 2, "it was not started again")
        again = metrics(server)
        assert again["sightline_engine_restarts_total"] == 1
        totals = [name for name in before if name.endswith("_total")]
        assert all(before[name] <= after[name] <= again[name] for name in totals), (before, after, again)
        assert again["sightline_kv_blocks"] == before["sightline_kv_blocks"]
        said = await asyncio.gather(*(ask(http, "What does the canary see?") for _ in range(6)))
        assert said == [quiet] * 6
    assert survivor in {child.pid for child in server.children("engine.worker")}
    assert "Traceback" not in server.stderr


async def test_two_engines_share_the_work_and_a_second_question_finds_its_cache(server: Any) -> None:
    engines = server.children("engine.worker")
    async with httpx.AsyncClient(base_url=server.url, timeout=120) as http:
        before = [engine.cpu_times().user for engine in engines]
        await asyncio.gather(*(stream(http, f"Story {index}.") for index in range(8)))
        spent = [engine.cpu_times().user - was for engine, was in zip(engines, before, strict=True)]
        assert min(spent) > max(spent) / 3, f"processor seconds by engine: {spent}"
        long = "Tell me of the sea, the wind and the ships. " * 12
        for number in range(3):
            text = f"Case {number}: {long}"
            first = await http.post("/v1/chat/completions", json=body(text, max_tokens=4))
            second = await http.post("/v1/chat/completions", json=body(text, max_tokens=4))
            details = [answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] for answer in (first, second)]
            assert details[1] > 128 > details[0], details
    server.end()
    assert server.process.returncode == 0
    assert not any(engine.is_running() for engine in engines)


def test_an_engine_that_finds_no_device_ends_the_start_with_its_sentence(start_server: StartServer) -> None:
    server = start_server("--random", "tiny", "--device", "cuda:0,cuda:1", CUDA_VISIBLE_DEVICES="")
    assert server.process.wait(60) == 1
    assert "--device cuda:0: torch sees no CUDA GPU. Run 'sightline doctor', or use --device cpu." in server.stderr
