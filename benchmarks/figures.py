"""From the loads of a comparison to medians, ratios, and what the machine's own noise hides.

One configuration is measured as two systems, ``BASE`` and ``AGAIN``: what these differ by is noise, and a ratio inside
it is printed as "=". Knows numbers and the result files' rows. Knows nothing of servers, pages or clocks.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

FORMAT = 2
"""Of the result files; older ones held other figures and are not read."""
BASE, AGAIN = "ours", "ours-again"


@dataclass(frozen=True)
class Measure:
    id: str
    label: str
    unit: str
    better: Literal["more", "less"]


MEASURES = (
    Measure("tokens_per_s", "output tokens a second", "tok/s", "more"),
    Measure("tokens_per_cpu_s", "output tokens a second of the server's processor time", "tok/CPU-s", "more"),
    Measure("ttft_p50_ms", "time to first token, median", "ms", "less"),
    Measure("ttft_p99_ms", "time to first token, 99th percentile", "ms", "less"),
    Measure("tpot_p50_ms", "time of a token after the first, median over requests", "ms", "less"),
    Measure("itl_p50_ms", "between chunks, median", "ms", "less"),
    Measure("itl_p99_ms", "between chunks, 99th percentile", "ms", "less"),
)
BY_ID = {measure.id: measure for measure in MEASURES}


@dataclass(frozen=True)
class Load:
    """One system under one load in one round."""

    system: str
    concurrency: int
    round: int
    figures: Mapping[str, float]


@dataclass(frozen=True)
class Spread:
    """Of the rounds."""

    median: float
    least: float
    most: float


@dataclass(frozen=True)
class Gain:
    """How many times better ours is than a system, round by round; below 1 it is worse."""

    spread: Spread
    noise: float
    """How many times better ``BASE`` was than itself, or itself than it, in the worst round."""

    @property
    def is_noise(self) -> bool:
        return 1 / self.noise <= self.spread.median <= self.noise

    def __str__(self) -> str:
        if self.is_noise:
            return "="
        return f"{times(self.spread.median)} [{number(self.spread.least)}, {number(self.spread.most)}]"


def figures_of(summary: Mapping[str, Any], server_cpu_s: float) -> dict[str, float]:
    """The figures of one load from the load generator's summary; a time that no request gave is left out."""
    rates, tokens = summary["throughput"], summary["tokens"]["output"]
    told = {"tokens_per_s": rates["output_tokens_per_s"]}
    if server_cpu_s > 0:
        told["tokens_per_cpu_s"] = round(tokens / server_cpu_s, 2)
    for kind in ("ttft", "itl", "tpot"):
        if summary[f"{kind}_ms"] is not None:
            told |= {f"{kind}_{part}_ms": summary[f"{kind}_ms"][part] for part in ("p50", "p99")}
    return told


def loads_of(rows: Iterable[Mapping[str, Any]]) -> list[Load]:
    """The loads of one model in a result file."""
    return [Load(row["system"], row["concurrency"], row["round"], row["figures"]) for row in rows]


def spread(values: Sequence[float]) -> Spread:
    return Spread(statistics.median(values), min(values), max(values))


def by_round(loads: Iterable[Load], system: str, concurrency: int, measure: str) -> dict[int, float]:
    return {
        load.round: load.figures[measure]
        for load in loads
        if load.system == system and load.concurrency == concurrency and measure in load.figures
    }


def gains(loads: Sequence[Load], system: str, concurrency: int, measure: str, ours: str = BASE) -> list[float]:
    """``ours`` over ``system`` in each round that has both, above 1 where it is better."""
    ours_by_round, others = (by_round(loads, name, concurrency, measure) for name in (ours, system))
    ratios = [rate / others[turn] for turn, rate in sorted(ours_by_round.items()) if others.get(turn) and rate]
    return ratios if BY_ID[measure].better == "more" else [1 / ratio for ratio in ratios]


def noise(loads: Sequence[Load], concurrency: int, measure: str) -> float:
    """The largest factor between ``BASE`` and ``AGAIN`` in a round; 1 where it wasn't measured twice."""
    return max((max(ratio, 1 / ratio) for ratio in gains(loads, AGAIN, concurrency, measure)), default=1.0)


def gain(loads: Sequence[Load], system: str, concurrency: int, measure: str, ours: str = BASE) -> Gain | None:
    """Nothing where no round has both."""
    ratios = gains(loads, system, concurrency, measure, ours)
    return Gain(spread(ratios), noise(loads, concurrency, measure)) if ratios else None


def concurrencies(loads: Iterable[Load]) -> list[int]:
    return sorted({load.concurrency for load in loads})


def number(value: float) -> str:
    """Three figures, or all of the whole number."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def times(value: float) -> str:
    return f"{number(value)}x"
