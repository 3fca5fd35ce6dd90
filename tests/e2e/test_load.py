"""Many requests at once against the true server: each ends once, nothing is left behind, nobody disturbs another."""

import asyncio
import base64
import io
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from tracer import IS_TRACED

StartServer = Callable[..., Any]

REQUESTS = 200


def noise_url(seed: int, size: int = 64) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def body(text: str, *urls: str, **fields: Any) -> dict[str, Any]:
    content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    content.append({"type": "text", "text": text})
    return {"model": "random-tiny", "messages": [{"role": "user", "content": content}]} | fields


CANARY = body(
    "What does the canary see?", noise_url(7), seed=11, max_tokens=24, ignore_eos=True, logprobs=True, top_logprobs=3
)


def metrics(server: Any) -> dict[str, float]:
    text = httpx.get(server.url + "/metrics").text
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.labels
    }


async def canary_bytes(http: httpx.AsyncClient) -> str:
    answer = await http.post("/v1/chat/completions", json=CANARY)
    assert answer.status_code == 200, answer.text
    return json.dumps(answer.json()["choices"])


async def one(http: httpx.AsyncClient, number: int) -> str:
    """Sends request ``number`` of the mix and names how it ended."""
    stream = number % 2 == 0
    urls = [noise_url(number % 23 + i) for i in range(number % 4)]
    fields: dict[str, Any] = {"stream": stream, "max_tokens": 8 + number % 40, "ignore_eos": True, "seed": number}
    match number % 20:
        case 3:
            wrong = body("word " * 6000, **fields)
        case 7:
            wrong = body("Look!", "data:image/png;base64,iVBORw0KGgo=", **fields)
        case 11:
            wrong = body("Hm?", colour="blue", **fields)
        case 15:
            answer = await http.post(
                "/v1/chat/completions", content=b'{"model": ', headers={"content-type": "application/json"}
            )
            assert answer.status_code == 400
            return f"refused: {answer.json()['error']['code']}"
        case _:
            if number % 4 == 1:
                return await leave_midway(http, body("Tell me more.", *urls, **fields | {"max_tokens": 400}))
            return await take_all(http, body("Tell me.", *urls, **fields))
    answer = await http.post("/v1/chat/completions", json=wrong)
    assert answer.status_code == 400, answer.text
    return f"refused: {answer.json()['error']['code']}"


async def leave_midway(http: httpx.AsyncClient, request: dict[str, Any]) -> str:
    if not request["stream"]:
        task = asyncio.create_task(http.post("/v1/chat/completions", json=request))
        await asyncio.sleep(0.3)
        task.cancel()
        return "left"
    async with http.stream("POST", "/v1/chat/completions", json=request) as answer:
        assert answer.status_code == 200, await answer.aread()
        async for line in answer.aiter_lines():
            if '"content"' in line:
                break
    return "left"


async def take_all(http: httpx.AsyncClient, request: dict[str, Any]) -> str:
    if not request["stream"]:
        answer = await http.post("/v1/chat/completions", json=request)
        assert answer.status_code == 200, answer.text
        return f"ended: {answer.json()['choices'][0]['finish_reason']}"
    async with http.stream("POST", "/v1/chat/completions", json=request) as answer:
        assert answer.status_code == 200, await answer.aread()
        data = [line.removeprefix("data: ") async for line in answer.aiter_lines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    reasons = [reason for line in data[:-1] if (reason := json.loads(line)["choices"][0]["finish_reason"])]
    assert len(reasons) == 1, f"a stream ended for {reasons}"
    return f"ended: {reasons[0]}"


async def until_idle(server: Any, timeout_s: float = 10.0) -> dict[str, float]:
    deadline = time.monotonic() + timeout_s
    while True:
        seen = metrics(server)
        busy = {name: seen[f"sightline_{name}"] for name in ("requests_running", "requests_waiting", "kv_blocks_used")}
        if not any(busy.values()):
            return seen
        assert time.monotonic() < deadline, f"still held: {busy}"
        await asyncio.sleep(0.05)


def held_by(server: Any) -> dict[int, int]:
    """Open files by process of the server's tree."""
    root = psutil.Process(server.process.pid)
    return {process.pid: process.num_fds() for process in (root, *root.children(recursive=True))}


async def test_O2_O5_200_mixed_requests_at_once_leave_nothing_behind(start_server: StartServer) -> None:
    server = start_server("--random", "tiny", "--deterministic", "--cpu-cache-gb", "0.0012", "--max-queue", "500")
    server.wait_for("/ready", 200)
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
        quiet = await canary_bytes(http)
        before = held_by(server)
    async with httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits) as http:
        canaries = [canary_bytes(http) for _ in range(3)]
        *outcomes, first, second, third = await asyncio.gather(*(one(http, i) for i in range(REQUESTS)), *canaries)
    assert [first, second, third] == [quiet] * 3, "the canary's bytes changed under load"
    counts = Counter(outcomes)
    assert counts == {
        "ended: length": 110,
        "left": 50,
        "refused: context_length_exceeded": 10,
        "refused: image_parse_error": 10,
        "refused: unsupported_parameter": 10,
        "refused: invalid_json": 10,
    }
    seen = await until_idle(server)
    assert seen["sightline_engine_restarts_total"] == 0
    assert seen["sightline_preemptions_total"] > 0, "the cache was never full: this test should make it so"
    # Closed connections are noticed within moments.
    await asyncio.sleep(1)
    after = held_by(server)
    assert after.keys() == before.keys(), "processes were lost or left"
    assert all(after[pid] <= before[pid] + 2 for pid in before), f"open files before {before}, after {after}"
    async with httpx.AsyncClient(base_url=server.url, timeout=60) as http:
        assert await canary_bytes(http) == quiet
    assert "Traceback" not in server.stderr


def first_token_s(server: Any, request: dict[str, Any]) -> tuple[float, str, dict[str, Any]]:
    """Seconds to the first piece of text, the whole text, and the usage."""
    text, usage, first = "", {}, 0.0
    began = time.monotonic()
    with httpx.stream("POST", server.url + "/v1/chat/completions", json=request, timeout=60) as answer:
        assert answer.status_code == 200, answer.read()
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            if chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                first = first or time.monotonic() - began
                text += chunk["choices"][0]["delta"]["content"]
            usage = chunk["usage"] or usage
    return first, text, usage


def test_a_second_question_about_pictures_is_answered_from_the_caches(
    start_server: StartServer,
) -> None:
    # A model big enough, and pictures enough, that computing them takes time on any machine.
    larger_server = start_server("--random", "llava-110m")
    larger_server.wait_for("/ready", 200)
    uncached = start_server("--random", "llava-110m", "--no-prefix-caching", "--encoder-cache-mb", "0")
    common: dict[str, Any] = {
        "model": "random-llava-110m",
        "temperature": 0,
        "max_tokens": 12,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    firsts, seconds = [], []
    for seed in range(5):
        looks = [noise_url(3 * seed + number, 640) for number in range(3)]
        first_s, _, usage = first_token_s(larger_server, body("What is this?", *looks, **common))
        assert usage["prompt_tokens_details"]["cached_tokens"] < 16
        decoded = metrics(larger_server)["sightline_images_decoded_total"]
        second_s, text, usage = first_token_s(larger_server, body("And who made it, and why?", *looks, **common))
        details = usage["prompt_tokens_details"]
        assert details["image_tokens"] == 3 * 196
        assert details["cached_tokens"] >= details["image_tokens"] - 16
        assert metrics(larger_server)["sightline_images_decoded_total"] == decoded, "a picture was decoded again"
        firsts.append(first_s)
        seconds.append(second_s)
        if seed == 0:
            uncached.wait_for("/ready", 200)
        _, cold, _ = first_token_s(uncached, body("And who made it, and why?", *looks, **common))
        assert text == cold
    # Under a tracer (scripts/no_egress) every call of a socket takes long, of the first answer and of the second.
    if not IS_TRACED:
        assert statistics.median(seconds) <= statistics.median(firsts) / 3, f"first {firsts}, second {seconds}"
