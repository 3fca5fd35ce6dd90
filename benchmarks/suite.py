"""The comparison behind every speed claim on a CPU: one stream of ours, many streams of ours, many of the peer's.

Both servers serve the same weights and stay up through all rounds; each round runs the other way round than the one
before (ABBA), so that a machine that slows down or a neighbour that wakes up takes from both. Medians are reported
with the least and most of the rounds; beside output tokens a second stand those a second of processor time, which a
neighbour disturbs less. Run it with `scripts/bench`.
"""

import argparse
import contextlib
import dataclasses
import datetime
import json
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks import transformers_serve
from benchmarks.machine import ROOT, describe_machine, load_average
from benchmarks.servers import Server, ServerError, bench, free_port, running, sightline_command

STREAMS = 16
INPUT_LEN, OUTPUT_LEN = 64, 128
SYSTEMS = {
    "single": "1 stream",
    "many": f"{STREAMS} streams",
    "peer_untuned": f"transformers serve, {STREAMS}",
    "peer": f"the same, tuned, {STREAMS}",
}
TARGETS = {"demo": (5.0, 8.0), "llava-45m": (3.0, 8.0)}
"""How many times one stream of ours, and how many times the peer, STREAMS of ours must bring."""


@dataclass(frozen=True)
class Size:
    rounds: int
    prompts_single: int
    prompts_many: int


QUICK = Size(rounds=2, prompts_single=4, prompts_many=STREAMS)
FULL = Size(rounds=6, prompts_single=8, prompts_many=3 * STREAMS)


MEASURES = {
    "per_second": "Output tokens a second",
    "per_cpu_second": "Output tokens a second of the server's processor time",
}


@dataclass
class Outcome:
    """What one model gave."""

    model: str
    configs: dict[str, Any] = field(default_factory=dict)
    """For each side the variant that competes, and what every variant gave when tried."""
    rates: dict[str, dict[str, list[float]]] = field(default_factory=lambda: {measure: {} for measure in MEASURES})
    """By measure and system (one of ``SYSTEMS``), a figure a round."""
    runs: list[dict[str, Any]] = field(default_factory=list)

    def add(self, system: str, turn: int, summary: dict[str, Any]) -> None:
        tokens = summary["tokens"]["output"]
        for measure, rate in (("per_second", _rate(summary)), ("per_cpu_second", tokens / summary["server_cpu_s"])):
            self.rates[measure].setdefault(system, []).append(round(rate, 2))
        self.runs.append({"system": system, "round": turn, "load": load_average(), "summary": summary})

    def ratios(self, measure: str, over: str) -> list[float]:
        """Our many streams over ``over``, round by round."""
        rates = self.rates[measure]
        return [ours / other for ours, other in zip(rates["many"], rates.get(over, ()), strict=False)]

    def to_json(self) -> dict[str, Any]:
        told: dict[str, Any] = {"model": self.model, "configs": self.configs}
        single, peer = TARGETS.get(self.model, (None, None))
        targets = {"single": single, "peer": peer, "peer_untuned": peer}
        for measure, rates in self.rates.items():
            told[measure] = {system: {**spread(values), "rounds": values} for system, values in rates.items()}
            for other in targets:
                if ratios := self.ratios(measure, other):
                    told[measure][f"many_over_{other}"] = {**spread(ratios), "target": targets.get(other)}
        told["runs"] = self.runs
        return told


def spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 3),
        "min": round(min(values), 3),
        "max": round(max(values), 3),
    }


@contextlib.contextmanager
def checkpoint(name: str) -> Iterator[Path]:
    """A folder with the weights both servers load: the demo model's own, or random ones of a named shape."""
    # Only for writing weights is torch wanted: the rest of this process starts servers and waits.
    from sightline_models import presets, tiny

    if name == "demo":
        yield presets.demo_checkpoint()
        return
    folder = Path(tempfile.mkdtemp(prefix="sightline-weights-"))
    try:
        tiny.write_checkpoint(folder, preset=name, seed=0, dtype="bfloat16")
        yield folder
    finally:
        shutil.rmtree(folder)


@dataclass(frozen=True)
class Variant:
    """One way to start a side: its precision and its torch threads."""

    side: str
    dtype: str
    threads: str
    """A number, or ``default`` for what that server chooses by itself."""

    @property
    def environment(self) -> dict[str, str]:
        return {} if self.threads == "default" else {"OMP_NUM_THREADS": self.threads}


OURS = [Variant("ours", dtype, threads) for dtype in ("auto", "bfloat16") for threads in ("default", "1")]
PEERS = [Variant("peer", dtype, threads) for dtype in transformers_serve.DTYPES for threads in ("default", "1")]
UNTUNED = Variant("peer", "auto", "default")
"""The peer with its own defaults; the other one has the precision and the threads that were fastest here."""


@contextlib.contextmanager
def started(variant: Variant, folder: Path, serve_flags: list[str]) -> Iterator[Server]:
    """The server of one variant. ``folder`` is the checkpoint, for the peer as ``link_checkpoint`` makes it."""
    if variant.side == "peer":
        with transformers_serve.serving(folder, variant.dtype, environment=variant.environment) as server:
            yield server
        return
    port = free_port()
    threads = [] if variant.threads == "default" else ["--threads", variant.threads]
    command = sightline_command(port, str(folder), "--dtype", variant.dtype, *threads, *serve_flags)
    with running("sightline", command, port=port, ready_path="/ready") as server:
        yield server


def choose(variants: list[Variant], folder: Path, serve_flags: list[str], console: Console) -> dict[str, Any]:
    """Try the variants of one side briefly under the load that counts; the fastest competes."""
    tried = []
    for variant in variants:
        with started(variant, folder, serve_flags) as server:
            _ask(server, variant.side, prompts=1, streams=1, output_len=8)
            # The peer takes requests one by one: a few of them tell its speed.
            streams = STREAMS if variant.side == "ours" else 4
            rate = _rate(_ask(server, variant.side, prompts=streams, streams=streams, output_len=OUTPUT_LEN // 2))
        console.print(f"  tried {server.name}, {variant.dtype}, {variant.threads} threads: {rate:,.0f} tokens/s")
        tried.append({**dataclasses.asdict(variant), "output_tokens_per_s": rate})
    return {"best": max(tried, key=lambda one: float(one["output_tokens_per_s"])), "tried": tried}


def measure(name: str, size: Size, with_peer: bool, serve_flags: list[str], console: Console) -> Outcome:
    outcome = Outcome(name)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(checkpoint(name))
        linked = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="sightline-peer-"))) / "model"
        transformers_serve.link_checkpoint(folder, linked)
        sides = [("ours", OURS, folder), *([("peer", PEERS, linked)] if with_peer else [])]
        servers = {}
        for side, variants, where in sides:
            chosen = outcome.configs[side] = choose(variants, where, serve_flags, console)
            best = Variant(*(chosen["best"][key] for key in ("side", "dtype", "threads")))
            servers[side] = stack.enter_context(started(best, where, serve_flags))
        if with_peer:
            servers["peer_untuned"] = stack.enter_context(started(UNTUNED, linked, serve_flags))
        for side, server in servers.items():
            _ask(server, side, prompts=STREAMS, streams=STREAMS, output_len=8)
        order = [system for system in SYSTEMS if with_peer or not system.startswith("peer")]
        for turn in range(size.rounds):
            for system in order if turn % 2 == 0 else reversed(order):
                side = system if system.startswith("peer") else "ours"
                prompts, streams = (size.prompts_single, 1) if system == "single" else (size.prompts_many, STREAMS)
                summary = _ask(servers[side], side, prompts=prompts, streams=streams, output_len=OUTPUT_LEN)
                outcome.add(system, turn, summary)
                console.print(f"  round {turn + 1}, {system}: {_rate(summary):,.0f} output tokens/s")
    return outcome


def _ask(server: Server, side: str, *, prompts: int, streams: int, output_len: int) -> dict[str, Any]:
    summary = bench(
        server,
        num_prompts=prompts,
        max_concurrency=streams,
        input_len=INPUT_LEN,
        output_len=output_len,
        images="own",
        # Servers are warmed once: a warm-up inside each load would count in the processor time.
        warmup=0,
        # The peer refuses the field; its folder names no end token instead.
        ignore_eos=not side.startswith("peer"),
    )
    if summary["counts"]["short"]:
        raise ServerError(f"{server.name} ended {summary['counts']['short']} answers early: the loads differ.")
    return summary


def _rate(summary: dict[str, Any]) -> float:
    return float(summary["throughput"]["output_tokens_per_s"])


def table(measure: str, outcomes: list[Outcome]) -> Table:
    shown = Table(title=MEASURES[measure], title_justify="left")
    for heading in ("model", *SYSTEMS.values()):
        shown.add_column(heading, justify="left" if heading == "model" else "right")
    for outcome in outcomes:
        cells = []
        for system in SYSTEMS:
            values = outcome.rates[measure].get(system)
            rate = f"{statistics.median(values):,.0f}" if values else "-"
            gain = "" if system == "many" or not values else f"\n{_gain(outcome.ratios(measure, system))}"
            cells.append(rate + gain)
        shown.add_row(outcome.model, *cells)
    return shown


def _gain(ratios: list[float]) -> str:
    """Our many streams over the system of this column."""
    return f"x {statistics.median(ratios):.1f} [{min(ratios):.1f}, {max(ratios):.1f}]"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--full", action="store_true", help="more rounds and requests (quick: under five minutes)")
    parser.add_argument("--models", default="demo,llava-45m", help="demo or names of shapes (%(default)s)")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True, help="transformers serve too")
    parser.add_argument("--serve-flag", action="append", default=[], metavar="FLAG", help="for sightline serve")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: a dated file in benchmarks/results")
    args = parser.parse_args(arguments)
    console = Console()
    if args.peer and (missing := transformers_serve.missing_packages()):
        console.print(
            f"transformers serve needs {', '.join(missing)}: .venv/bin/pip install -e '.[bench]', or leave it out "
            "with --no-peer."
        )
        return 1
    # Ended from outside, it still ends the servers it has started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    began = time.monotonic()
    document: dict[str, Any] = {"suite": "cpu", "size": "full" if args.full else "quick", "machine": describe_machine()}
    outcomes = []
    try:
        for name in args.models.split(","):
            console.print(f"[bold]{name}[/]")
            outcomes.append(measure(name, FULL if args.full else QUICK, args.peer, args.serve_flag, console))
    except ServerError as error:
        console.print(str(error), markup=False)
        return 1
    document["load_after"] = load_average()
    document["seconds"] = round(time.monotonic() - began, 1)
    document["serve_flags"] = args.serve_flag
    document["models"] = [outcome.to_json() for outcome in outcomes]
    path = args.json or ROOT / "benchmarks/results" / f"cpu-{datetime.date.today():%Y-%m-%d}.json"
    path.write_text(json.dumps(document, indent=1) + "\n")
    console.print(
        f"Own picture each, {INPUT_LEN} text tokens in, {OUTPUT_LEN} out. Below each rate: {STREAMS} streams of ours, "
        "times that, as median [least, most] of the rounds."
    )
    for measure_name in MEASURES:
        console.print(table(measure_name, outcomes))
    console.print(
        f"Load {document['machine']['load'][0]} before and {document['load_after'][0]} after. Written: {path}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
