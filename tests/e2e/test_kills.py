"""A few rounds of kills against a true server with the demo model; ``kills.run`` takes any number."""

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from hostile.kills import READY_S, SIGNALS, TARGETS, run


async def test_E4_whatever_dies_or_stops_under_load_every_request_ends_once_and_the_server_is_back(
    start_server: Callable[..., Any],
) -> None:
    began = time.monotonic()
    server = start_server("--deterministic", "--decode-timeout-s", "2")
    server.wait_for("/ready", 200)
    # Test machines are shared: where a start takes long, so does the next one.
    ready_s = max(READY_S, 4 * (time.monotonic() - began))
    count = len(TARGETS) * len(SIGNALS)
    rounds = await run(server.url, server.process.pid, "sightline-demo", count, seed=4, ready_s=ready_s)
    assert [problem for made in rounds for problem in made.problems] == []
    assert {(made.target, made.signal) for made in rounds} == {
        (target, number) for target in TARGETS for number in SIGNALS
    }
    ends = sum((made.ends for made in rounds), Counter[str]())
    assert sum(ends.values()) == 8 * len(rounds)
    assert ends["answer"] > ends["engine_restarting"] > 0
    assert "Traceback" not in server.stderr
