"""Tortures a true server and says what broke: ``scripts/torture --help``.

Knows the order of the parts, their sizes and how a server is started. What a part does is in its own file.
"""

import argparse
import asyncio
import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from benchmarks.servers import Server, free_port, running, sightline_command
from hostile import flood, kills, picture_run, restarts, victims

DEMO = "sightline-demo"
PARTS = ("pictures", "requests", "victims", "kills", "restarts")
LEAST_ATTACK_S = 4
FULL = {"pictures": 1_000_000, "requests": 100_000, "victims": 60, "kills": 300, "restarts": 30}
"""Pictures, requests, seconds under attack, kills of a child, kills and stops of the API process."""


@contextmanager
def server(*flags: str) -> Iterator[Server]:
    port = free_port()
    with running("the server", sightline_command(port, *flags), port=port, ready_path="/ready") as started:
        yield started


def torture_pictures(count: int, seed: int) -> list[str]:
    return picture_run.run(count, seed)


def torture_requests(count: int, seed: int) -> list[str]:
    with server("--deterministic", "--log-level", "error", "--refusal-delay-s", "0") as started:
        return asyncio.run(flood.run(started.url.removesuffix("/v1"), started.pid, DEMO, count, seed))


def torture_victims(seconds: int, seed: int) -> list[str]:
    seconds = max(seconds, LEAST_ATTACK_S)
    with server("--log-level", "warning") as started:
        return asyncio.run(victims.run(started.url.removesuffix("/v1"), started.pid, DEMO, seconds, seed))


def torture_kills(count: int, seed: int) -> list[str]:
    with server("--deterministic", "--log-level", "error") as started:
        rounds = asyncio.run(kills.run(started.url.removesuffix("/v1"), started.pid, DEMO, count, seed))
    print(f"  ready again after at most {max(each.ready_s for each in rounds):.1f} s")
    return [f"{each}: {problem}" for each in rounds for problem in each.problems]


def torture_restarts(count: int, seed: int) -> list[str]:
    return asyncio.run(restarts.run(count, seed))


RUNS: dict[str, Callable[[int, int], list[str]]] = {
    "pictures": torture_pictures,
    "requests": torture_requests,
    "victims": torture_victims,
    "kills": torture_kills,
    "restarts": torture_restarts,
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="scripts/torture", description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"some of {', '.join(PARTS)}; all without one")
    parser.add_argument(
        "--share", type=float, default=1.0, help="how much of the full size to run, 0.01 for a hundredth"
    )
    parser.add_argument("--seed", type=int, help="repeats an earlier run's hostile inputs; default: a new one")
    arguments = parser.parse_args()
    unknown = set(arguments.parts) - set(PARTS)
    if unknown:
        parser.error(f"there is no part {', '.join(sorted(unknown))}: choose from {', '.join(PARTS)}")
    seed = random.SystemRandom().randrange(2**32) if arguments.seed is None else arguments.seed
    print(f"seed {seed}: scripts/torture --seed {seed} sends the same again", flush=True)
    failed = False
    for part in arguments.parts or PARTS:
        size = max(1, round(FULL[part] * arguments.share))
        print(f"{part}, {size:,} of {FULL[part]:,}:", flush=True)
        began = time.monotonic()
        problems = RUNS[part](size, seed)
        failed |= bool(problems)
        for problem in problems:
            print(f"  FAILED: {problem}")
        print(f"  {'failed' if problems else 'passed'} in {time.monotonic() - began:.0f} s", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
