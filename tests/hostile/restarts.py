"""Kills the API process itself, or stops it for a while, under load: who supervises it is outside, so a kill is
followed by a fresh start on the same port.

Knows processes, ports and clients. What has to hold: nothing of a killed server outlives it, its clients' connections
end at once, and the next start is ready in time; one that was stopped goes on as if nothing had been, with the same
processes, and every request is answered.
"""

import asyncio
import os
import random
import signal
import time

import httpx
import psutil
from benchmarks.servers import free_port, running, sightline_command
from hostile.chats import canary, chat_body
from hostile.kills import READY_S

DEMO = "sightline-demo"
LOAD = 8
GONE_S = 5.0


async def run(rounds: int, seed: int) -> list[str]:
    """Prints each round. Returns what went wrong, a sentence each."""
    draw, port = random.Random(seed), free_port()
    problems: list[str] = []
    expected = ""
    for number in range(1, rounds + 1):
        began = time.monotonic()
        command = sightline_command(port, "--deterministic", "--log-level", "error")
        with running("the server", command, port=port, ready_path="/ready") as server:
            ready_s = time.monotonic() - began
            if ready_s > READY_S:
                problems.append(f"round {number}: ready only after {ready_s:.1f} s")
            async with httpx.AsyncClient(base_url=server.url.removesuffix("/v1"), timeout=60) as http:
                answer = await canary(http, DEMO)
                expected = expected or answer
                if answer != expected:
                    problems.append(f"round {number}: the canary answered otherwise")
                tree = psutil.Process(server.pid).children(recursive=True)
                requests = [asyncio.create_task(_ask(http, seed + index)) for index in range(LOAD)]
                await asyncio.sleep(draw.uniform(0.1, 0.5))
                stopped_s = draw.uniform(1.0, 5.0)
                os.kill(server.pid, signal.SIGSTOP)
                await asyncio.sleep(stopped_s)
                os.kill(server.pid, signal.SIGCONT)
                ends = await asyncio.gather(*requests)
                if ends != ["200"] * LOAD or any(not process.is_running() for process in tree):
                    problems.append(f"round {number}: stopped for {stopped_s:.1f} s, requests ended {ends}")
                requests = [asyncio.create_task(_ask(http, seed + index)) for index in range(LOAD)]
                await asyncio.sleep(draw.uniform(0.1, 0.5))
                struck = time.monotonic()
                os.kill(server.pid, signal.SIGKILL)
                ends = await asyncio.gather(*requests)
                ended_s = time.monotonic() - struck
            _, alive = psutil.wait_procs(tree, timeout=GONE_S)
            if alive or ended_s > GONE_S:
                problems.append(f"round {number}: {len(alive)} processes left, requests ended after {ended_s:.1f} s")
        lost = sum(end != "200" for end in ends)
        print(f"  {number}: ready in {ready_s:.1f} s; stopped for {stopped_s:.1f} s; killed: {lost} of {LOAD} cut off")
    return problems


async def _ask(http: httpx.AsyncClient, seed: int) -> str:
    """How one request ended: its status, or the name of what the connection met."""
    body = chat_body(DEMO, "Tell me more.", seed=seed, max_tokens=150, ignore_eos=True)
    try:
        return str((await http.post("/v1/chat/completions", json=body)).status_code)
    except httpx.TransportError as error:
        return type(error).__name__
