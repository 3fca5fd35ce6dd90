"""Whether one key can tell by the clock what another has sent: a picture that another key's caches hold, against one
that nobody has sent.

Prints its figures (`pytest -s -m slow`). Minutes long; other work beside it only widens both distributions.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from hostile.chats import chat_body, noise_url

from sightline_server.auth.keys_file import create_key
from sightline_server.auth.principal import Limits, Scope

StartServer = Callable[..., Any]
SAMPLES = 1000
SHARED_SAMPLES = 100


def mann_whitney_p(one: list[float], other: list[float]) -> float:
    """Two-sided p that two samples are of one distribution, by the normal approximation (Mann and Whitney, 1947)."""
    values = np.array(one + other)
    ranks = np.empty(len(values))
    ranks[values.argsort()] = np.arange(1, len(values) + 1)
    n, m = len(one), len(other)
    u = ranks[:n].sum() - n * (n + 1) / 2
    z = (u - n * m / 2) / (n * m * (n + m + 1) / 12) ** 0.5
    return 2 * statistics.NormalDist().cdf(-abs(z))


def test_mann_whitney_tells_samples_apart() -> None:
    draw = np.random.default_rng(1)
    one, same, shifted = (draw.normal(mean, 1, 500).tolist() for mean in (0.0, 0.0, 0.3))
    assert mann_whitney_p(one, same) > 0.05
    assert mann_whitney_p(one, shifted) < 1e-4


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_K9_another_keys_picture_cannot_be_told_from_a_miss_by_the_clock(
    start_server: StartServer, tmp_path: Path
) -> None:
    file = tmp_path / "keys"
    ann, bob = (create_key(file, name, (Scope.CHAT,), Limits())[1] for name in ("ann", "bob"))
    flags = ("--keys-file", str(file))

    def waits(server: Any, samples: int) -> tuple[list[float], list[float]]:
        """Seconds to bob's answers of one token: about pictures that ann has just sent, and about new ones."""
        draw = np.random.default_rng(7)
        sent_s: list[float] = []
        new_s: list[float] = []
        with httpx.Client(base_url=server.url, timeout=60) as http:

            def ask_s(key: str, url: str) -> float:
                body = chat_body("sightline-demo", "What is this?", url, max_tokens=1)
                began = time.perf_counter()
                answer = http.post("/v1/chat/completions", json=body, headers={"Authorization": f"Bearer {key}"})
                took_s = time.perf_counter() - began
                assert answer.status_code == 200, answer.text
                return took_s

            # The first answers of a server are slower.
            for seed in range(20):
                ask_s((ann, bob)[seed % 2], noise_url(10**6 + seed))
            turns = draw.permutation(np.arange(2 * samples) % 2)
            for turn, is_sent in enumerate(turns):
                hers, his = noise_url(2 * turn), noise_url(2 * turn + 1)
                ask_s(ann, hers)
                (sent_s if is_sent else new_s).append(ask_s(bob, hers if is_sent else his))
        return sent_s, new_s

    def told(server: Any, samples: int) -> float:
        server.wait_for("/ready", 200)
        sent_s, new_s = waits(server, samples)
        p = mann_whitney_p(sent_s, new_s)
        medians = " and ".join(f"{statistics.median(each) * 1000:.2f}" for each in (sent_s, new_s))
        print(f"\n{samples} samples each: medians {medians} ms, p {p:.3g}")
        return p

    assert told(start_server(*flags), SAMPLES) > 0.01
    # Where caches are shared the clock does tell, so this test can see it.
    assert told(start_server(*flags, "--share-caches"), SHARED_SAMPLES) < 1e-6
