"""Sends mutated pictures through the true decode path, a process a core. Knows counts and processes, not pictures."""

import multiprocessing
import os
import time
from collections import Counter

from hostile.pictures import check_picture, mutated_pictures

SLOW_S = 1.0
"""Of processor time: no small file may take longer than this to decode or refuse."""


def run(count: int, seed: int) -> list[str]:
    """Prints what became of ``count`` pictures. Returns what went wrong, a sentence each."""
    processes = min(count, len(os.sched_getaffinity(0)))
    shares = [(seed + number, count // processes + (number < count % processes)) for number in range(processes)]
    # A fresh interpreter each: this one may hold threads.
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        results: list[tuple[Counter[str], list[str]]] = pool.starmap(_check, shares)
    outcomes = sum((outcome for outcome, _ in results), Counter())
    for name, times in outcomes.most_common():
        print(f"  {times:>9,} {name}")
    return [problem for _, problems in results for problem in problems]


def _check(seed: int, count: int) -> tuple[Counter[str], list[str]]:
    outcomes: Counter[str] = Counter()
    problems: list[str] = []
    for number, (kind, data) in enumerate(mutated_pictures(seed, count)):
        where = f"picture {number} of seed {seed} ({kind}, {len(data)} bytes)"
        began = time.process_time()
        try:
            outcomes[check_picture(data)] += 1
        except Exception as error:
            problems.append(f"{where}: {type(error).__name__}: {error}")
        took = time.process_time() - began
        if took > SLOW_S:
            problems.append(f"{where} took {took:.1f} s of the processor")
    return outcomes, problems[:20]
