"""Drives the load: when each request starts, how many are under way, and what the client itself costs.

Knows arrival times and concurrency. Knows nothing of what a request says or how results are summed up.
"""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import msgspec

from sightline_server.bench.client import Record, ask, auth_headers, describe_error
from sightline_server.bench.http import Endpoint, TransportError, open_request
from sightline_server.bench.workload import WorkloadSpec, draw_words, make_body

CALIBRATION_WORDS = (32, 96)
TYPICAL_TOKENS_PER_WORD = 1.3


class BenchError(Exception):
    """The run can't be made; the sentence says why and what would help."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The server under test."""

    endpoint: Endpoint
    model: str
    api_key: str | None = None
    timeout_s: float = 600.0


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """When requests start. Without a rate all may start at once; ``max_concurrency`` 0 means no limit."""

    max_concurrency: int = 0
    request_rate: float = 0.0
    """Requests a second, as a Poisson process; 0 means no wait between them."""
    seed: int = 0

    def offsets(self, count: int) -> list[float]:
        """Earliest start of each request, seconds after the first."""
        if not self.request_rate:
            return [0.0] * count
        draw = random.Random(f"arrivals/{self.seed}")
        times = [0.0]
        while len(times) < count:
            times.append(times[-1] + draw.expovariate(self.request_rate))
        return times[:count]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Every request's record, with the span they took and the processor time this process spent on them."""

    records: tuple[Record, ...]
    duration_s: float
    """From the first start to the last end."""
    client_cpu_s: float


async def find_model(endpoint: Endpoint, api_key: str | None) -> str:
    """The first model the server lists. Raises BenchError when there is none."""
    body = await _get_json(endpoint, "/models", auth_headers(api_key))
    models = body.get("data") if isinstance(body, dict) else None
    if not models or not isinstance(models[0], dict) or not isinstance(models[0].get("id"), str):
        raise BenchError("The server lists no model at /models. Name one with --model.")
    return str(models[0]["id"])


async def _get_json(endpoint: Endpoint, path: str, headers: dict[str, str]) -> object:
    try:
        async with asyncio.timeout(30), open_request(endpoint, "GET", path, headers=headers) as reply:
            body = await reply.read_all()
            if reply.status != 200:
                raise BenchError(f"GET {path} answered {' '.join(describe_error(reply.status, body))}")
            return msgspec.json.decode(body)
    except TimeoutError:
        raise BenchError(f"{endpoint.authority} did not answer GET {path} within 30 s.") from None
    except TransportError as error:
        raise BenchError(f"{error}. Is the server running at {endpoint.authority}?") from None
    except msgspec.MsgspecError:
        raise BenchError(f"GET {path} answered no JSON. Does --url end with the API's root, such as /v1?") from None


async def measure_tokens_per_word(target: Target, spec: WorkloadSpec) -> float | None:
    """Tokens the server's tokenizer makes of one of our words, or nothing when it reports no usage.

    Sends two short text requests, which are also the check that the server takes such requests at all: raises
    BenchError with its sentence when it doesn't.
    """
    counts = []
    for number, words in enumerate(CALIBRATION_WORDS):
        text = draw_words(spec.seed, -1 - number, words)
        body = make_body(spec, model=target.model, text=text, image=None, max_tokens=1)
        record = await _ask(target, body, index=-1, run_started=time.perf_counter())
        if record.error is not None:
            hint = " Some servers know no ignore_eos: try --no-ignore-eos." if spec.ignore_eos else ""
            raise BenchError(f"The first request failed: {record.error}: {record.message}{hint}")
        counts.append(record.prompt_tokens)
    if counts[1] <= counts[0]:
        return None
    return (counts[1] - counts[0]) / (CALIBRATION_WORDS[1] - CALIBRATION_WORDS[0])


async def warm_up(target: Target, bodies: Sequence[bytes]) -> None:
    """Send ``bodies`` at once and wait for all. Raises BenchError when one fails."""
    began = time.perf_counter()
    records = await asyncio.gather(*(_ask(target, body, index=-1, run_started=began) for body in bodies))
    for record in records:
        if record.error is not None:
            raise BenchError(f"A warm-up request failed: {record.error}: {record.message}")


async def run_load(
    target: Target, bodies: Sequence[bytes], arrivals: Arrivals, on_done: Callable[[Record], None]
) -> Run:
    """Send every body at its time and return when all have ended; ``on_done`` hears of each as it ends."""
    slots = asyncio.Semaphore(arrivals.max_concurrency or len(bodies) or 1)
    began, cpu_began = time.perf_counter(), time.process_time()

    async def one(index: int, body: bytes) -> Record:
        try:
            record = await _ask(target, body, index=index, run_started=began)
        finally:
            slots.release()
        on_done(record)
        return record

    waiting: list[Awaitable[Record]] = []
    for index, (body, offset) in enumerate(zip(bodies, arrivals.offsets(len(bodies)), strict=True)):
        if (ahead := began + offset - time.perf_counter()) > 0:
            await asyncio.sleep(ahead)
        await slots.acquire()
        waiting.append(asyncio.ensure_future(one(index, body)))
    records = await asyncio.gather(*waiting)
    cpu = time.process_time() - cpu_began
    first = min((record.started_s for record in records), default=0.0)
    last = max((record.started_s + record.e2e_s for record in records), default=0.0)
    return Run(records=tuple(records), duration_s=last - first, client_cpu_s=cpu)


async def _ask(target: Target, body: bytes, *, index: int, run_started: float) -> Record:
    return await ask(
        target.endpoint,
        body,
        headers=auth_headers(target.api_key),
        index=index,
        run_started=run_started,
        timeout_s=target.timeout_s,
    )
