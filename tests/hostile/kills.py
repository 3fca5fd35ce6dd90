"""Ends or stops a server's processes under load, round after round, and looks at what its clients see of it.

Knows processes, signals and HTTP. What has to hold: each request ends exactly once, with its answer or an error with
a name; `/health` answers throughout; the server is ready again in time, whole, and answers as it did before.
"""

import asyncio
import contextlib
import json
import os
import random
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import psutil
from hostile.chats import chat_body, noise_url

CHATS = "/v1/chat/completions"
TARGETS = ENGINE, DECODER, TEMPLATER = "engine.worker", "decode_worker", "template_worker"
SIGNALS = (signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV, signal.SIGABRT)
# How requests may end beside with their answer, when an engine dies under them.
NAMED = {"engine_restarting", "engine_starting", "request_crashed_engine", "server_is_overloaded"}
READY_S = 10.0
ANSWER_S = 120.0
PAUSE_S = 0.1


@dataclass
class Round:
    """What one round did and saw."""

    target: str
    signal: signal.Signals
    ends: Counter[str] = field(default_factory=Counter)
    """How many requests ended with "answer" or with which code."""
    ready_s: float = 0.0
    """From the signal until the server was ready with all its processes."""
    took_s: float = 0.0
    problems: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        ends = ", ".join(f"{count} {name}" for name, count in sorted(self.ends.items()))
        return f"{self.signal.name} to {self.target}: ready in {self.ready_s:.1f} s of {self.took_s:.1f}; {ends}"


def is_gone(process: psutil.Process) -> bool:
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


class Killer:
    def __init__(self, http: httpx.AsyncClient, pid: int, model: str, seed: int, ready_s: float) -> None:
        self._http = http
        self._ready_s = ready_s
        self._server = psutil.Process(pid)
        self._model = model
        self._draw = random.Random(seed)
        self._sent = seed * 1_000_000
        self._shape: Counter[str] = Counter()

    async def prepare(self) -> None:
        """Brings the server to the shape and the answer that each round has to bring back."""
        await self._probe()
        self._shape = self.processes()
        self._answer = await self.canary()
        self._files = self._open_files()

    def processes(self) -> Counter[str]:
        """How many of the server's processes run what; none that has ended counts."""
        return Counter(name for name, _ in self._running())

    async def canary(self) -> str:
        question = "What does the canary see?"
        wanted = chat_body(self._model, question, noise_url(7), temperature=0, max_tokens=16, ignore_eos=True)
        answer = await self._http.post(CHATS, json=wanted | {"logprobs": True, "top_logprobs": 2})
        assert answer.status_code == 200, f"the canary got {answer.status_code}: {answer.text[:300]}"
        return json.dumps(answer.json()["choices"])

    async def round(self, target: str, number: signal.Signals) -> Round:
        made = Round(target, number)
        began = time.monotonic()
        requests = [asyncio.create_task(self._request(made, index)) for index in range(8)]
        await asyncio.sleep(self._draw.uniform(0.0, 0.6))
        victim = self._draw.choice([process for name, process in self._running() if name == target])
        async with self._health_watched(made):
            struck = time.monotonic()
            os.kill(victim.pid, number)
            await self._whole_again(made, victim)
            made.ready_s = time.monotonic() - struck
            await asyncio.wait(requests, timeout=ANSWER_S)
        silent = [task for task in requests if not task.done()]
        for task in silent:
            task.cancel()
        await asyncio.gather(*requests, return_exceptions=True)
        if silent:
            made.problems.append(f"{len(silent)} requests had no end after {ANSWER_S:g} s")
        if made.ready_s > self._ready_s:
            made.problems.append(f"ready again only after {made.ready_s:.1f} s")
        if (answer := await self.canary()) != self._answer:
            made.problems.append(f"the canary's answer changed: {self._answer[:200]} became {answer[:200]}")
        made.took_s = time.monotonic() - began
        return made

    async def leaked(self) -> list[str]:
        """Files that the server has open beyond those of the beginning."""
        deadline = time.monotonic() + 5
        while (now := self._open_files()) > self._files:
            if time.monotonic() > deadline:
                return [f"{now} files are open, {self._files} were"]
            await asyncio.sleep(0.1)
        return []

    def _open_files(self) -> int:
        """But for the connections of this client, which stay open for a while."""
        return self._server.num_fds() - len(self._server.net_connections(kind="tcp"))

    def _running(self) -> list[tuple[str, psutil.Process]]:
        found = []
        for child in self._server.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                words = child.cmdline()
                found += [(name, child) for name in TARGETS if any(word.endswith(name) for word in words)]
        return found

    async def _whole_again(self, made: Round, victim: psutil.Process) -> None:
        """Waits for the victim's end, for `/ready`, and for as many processes as there were."""
        deadline = time.monotonic() + ANSWER_S
        while time.monotonic() < deadline:
            if (
                is_gone(victim)
                and (await self._http.get("/ready")).status_code == 200
                and self.processes() == self._shape
            ):
                return
            # One that has nothing to do is missed when it is needed.
            if made.target != ENGINE:
                await self._probe()
            await asyncio.sleep(PAUSE_S)
        made.problems.append(f"never whole again: {dict(self.processes())} instead of {dict(self._shape)}")

    async def _probe(self) -> None:
        """A new picture for each decoder, and more prompts at once than are rendered at once."""
        size = max(4, self.processes()[DECODER])
        await asyncio.gather(*(self._http.post(CHATS, json=self._picture_chat(max_tokens=1)) for _ in range(size)))

    def _picture_chat(self, **fields: Any) -> dict[str, Any]:
        self._sent += 1
        return chat_body(self._model, "What is this?", noise_url(self._sent), temperature=0, **fields)

    @contextlib.asynccontextmanager
    async def _health_watched(self, made: Round) -> AsyncIterator[None]:
        async def watch() -> None:
            while True:
                status = (await self._http.get("/health")).status_code
                if status != 200:
                    made.problems.append(f"/health said {status}")
                await asyncio.sleep(PAUSE_S)

        task = asyncio.create_task(watch())
        try:
            yield
        finally:
            task.cancel()
            (outcome,) = await asyncio.gather(task, return_exceptions=True)
            if not isinstance(outcome, asyncio.CancelledError):
                made.problems.append(f"/health met {outcome!r}")

    async def _request(self, made: Round, index: int) -> None:
        """One request of the load, which ends in ``made.ends`` or in ``made.problems``."""
        long = {"max_tokens": self._draw.randint(20, 200), "ignore_eos": True}
        wanted = (
            self._picture_chat(**long)
            if index % 2
            else chat_body(self._model, f"Say {self._draw.random()}.", temperature=0, **long)
        )
        try:
            end = await (self._streamed if index % 3 else self._whole)(wanted)
        except (httpx.HTTPError, ValueError, KeyError, IndexError, AssertionError) as error:
            made.problems.append(f"a request met {error!r}")
            return
        made.ends[end] += 1

    async def _whole(self, wanted: dict[str, Any]) -> str:
        answer = await self._http.post(CHATS, json=wanted)
        if answer.status_code != 200:
            return _named(answer.status_code, answer.json())
        assert answer.json()["choices"][0]["finish_reason"] == "length", answer.text
        return "answer"

    async def _streamed(self, wanted: dict[str, Any]) -> str:
        events = []
        async with self._http.stream("POST", CHATS, json=wanted | {"stream": True}) as answer:
            if answer.status_code != 200:
                return _named(answer.status_code, json.loads(await answer.aread()))
            async for line in answer.aiter_lines():
                if line.startswith("data: "):
                    events.append(line.removeprefix("data: "))
        errors = [json.loads(event) for event in events if event != "[DONE]" and "error" in json.loads(event)]
        assert events.count("[DONE]") + len(errors) == 1, f"a stream ended {events[-2:]}"
        if errors:
            assert json.loads(events[-1]) == errors[0], f"a stream went on after its error: {events[-2:]}"
            return _named(503, errors[0])
        assert events[-1] == "[DONE]"
        assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length", events[-2]
        return "answer"


def _named(status: int, answer: dict[str, Any]) -> str:
    error = answer["error"]
    assert set(error) == {"message", "type", "param", "code"}, answer
    assert (status, error["code"]) in {(503, code) for code in NAMED}, f"{status}: {answer}"
    return str(error["code"])


async def run(url: str, pid: int, model: str, rounds: int, seed: int = 0, ready_s: float = READY_S) -> list[Round]:
    """Each process and signal in turn, in an order drawn from ``seed``; prints each round as it ends.

    ``pid`` is the server's; it has to be ready, and to run with ``--deterministic``, or the canary may differ.
    """
    limits = httpx.Limits(max_connections=None)
    draw = random.Random(seed)
    choices = [(target, number) for target in TARGETS for number in SIGNALS]
    made: list[Round] = []
    async with httpx.AsyncClient(base_url=url, timeout=ANSWER_S, limits=limits) as http:
        killer = Killer(http, pid, model, seed, ready_s)
        await killer.prepare()
        while len(made) < rounds:
            draw.shuffle(choices)
            for target, number in choices[: rounds - len(made)]:
                made.append(await killer.round(target, number))
                print(f"  {len(made)}: {made[-1]}", *made[-1].problems, sep="\n    ", flush=True)
        made[-1].problems += await killer.leaked()
    return made
