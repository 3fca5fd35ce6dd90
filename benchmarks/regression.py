"""Whether a run is worse than an earlier one, by ratios alone: figures of two machines or hours are no comparison.

Knows result files. Knows nothing of servers. ``scripts/bench --against FILE`` calls it; nothing in CI does, since a
shared machine's noise is larger than most regressions.
"""

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.figures import AGAIN, BASE, FORMAT, concurrencies, gain, loads_of, times

MEASURES = ("tokens_per_s", "tokens_per_cpu_s")
MOST_LOSS = 0.15


def read(path: Path) -> dict[str, Any]:
    """A result file. Raises ValueError with the fix for one that can't be compared with."""
    try:
        document: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--against {path} can't be read ({error}): give a file that scripts/bench wrote.") from None
    if document.get("format") != FORMAT:
        raise ValueError(f"--against {path} was written by an older bench: make a new one with scripts/bench --full.")
    return document


def regressions(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """A sentence for each of our systems whose ratio to a peer fell by more than 15 % and the noise of both runs.

    What only one of the runs has is not compared; raises ValueError when they have nothing in common.
    """
    earlier = {model["model"]: loads_of(model["loads"]) for model in before["models"]}
    compared, worse = 0, []
    for model in after["models"]:
        old, new = earlier.get(model["model"], []), loads_of(model["loads"])
        systems = sorted({load.system for load in new} - {AGAIN})
        ours = [system for system in systems if system.startswith(BASE)]
        peers = [system for system in systems if not system.startswith(BASE)]
        for own, peer, concurrency, measure in itertools.product(ours, peers, concurrencies(new), MEASURES):
            was, found = (gain(loads, peer, concurrency, measure, own) for loads in (old, new))
            if was is None or found is None:
                continue
            compared += 1
            allowed = was.spread.median * (1 - MOST_LOSS) / max(was.noise, found.noise)
            if found.spread.median < allowed:
                worse.append(
                    f"{model['model']}, {concurrency} at once, {measure}: {own} gives {times(found.spread.median)} "
                    f"what {peer} does; it was {times(was.spread.median)}, and {times(allowed)} is the least allowed."
                )
    if not compared:
        raise ValueError("The two results share no peer: compare runs of the same models, neither with --no-peer.")
    return worse
