"""What every stage of the GPU check shares: its flags, its result file, its clock.

A stage is a process of its own (`python -m benchmarks.gpu.<name>`): a fault on the device ends that stage alone. Its
results are saved after each figure, so that a stage that is cut short leaves what it had.
"""

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = {"cpu": "tiny", "quick": "llava-110m", "full": "llava-1.5-7b"}
"""The shape a stage measures: on a CPU only that the code runs is of interest."""


class Stage:
    """One stage's options and results."""

    def __init__(self, name: str, device: str, quick: bool, out: Path | None, variant: str = "") -> None:
        self.name = name
        self.device = device
        self.quick = quick
        self.variant = variant
        """Which of the things that one module measures; each is a process of its own."""
        self.results: dict[str, Any] = {"stage": name, "device": device, "quick": quick, "variant": variant}
        self._out = out

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"

    @property
    def shape(self) -> str:
        return SHAPES["cpu" if not self.on_gpu else "quick" if self.quick else "full"]

    @property
    def trace_path(self) -> Path | None:
        """Where a stage may leave a trace beside its results."""
        return None if self._out is None else self._out.with_suffix(".trace.json.gz")

    def save(self, **results: Any) -> None:
        """Add to the results and write them all."""
        self.results.update(results)
        if self._out is not None:
            # A stage may be ended at any moment: the file is always a whole one.
            written = self._out.with_suffix(".part")
            written.write_text(json.dumps(self.results, indent=1) + "\n")
            os.replace(written, self._out)

    def say(self, line: str) -> None:
        print(f"[{self.name}] {line}", flush=True)


def run(name: str, measure: Callable[[Stage], None]) -> None:
    """Parse a stage's command line and run it."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.gpu.{name}")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--variant", default="")
    args = parser.parse_args()
    stage = Stage(f"{name}-{args.variant}" if args.variant else name, args.device, args.quick, args.out, args.variant)
    began = time.monotonic()
    measure(stage)
    stage.save(seconds=round(time.monotonic() - began, 2), finished=True)


def synchronize(device: str) -> None:
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def times_ms(action: Callable[[], object], device: str, *, warmup: int, repeats: int) -> list[float]:
    """Milliseconds of each of ``repeats`` calls, by device events on a GPU and by the clock on a CPU."""
    import torch

    for _ in range(warmup):
        action()
    synchronize(device)
    if device == "cpu":
        measured = []
        for _ in range(repeats):
            began = time.perf_counter()
            action()
            measured.append((time.perf_counter() - began) * 1000)
        return measured
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        action()
        mark.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(second) for first, second in itertools.pairwise(marks)]


def first_line(error: BaseException) -> str:
    """An error in a line: its kind and what it says first."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:300] if said else 'no words'}"


def summary_ms(times: list[float]) -> dict[str, float]:
    """Median, least and most of ``times``, rounded to microseconds."""
    return {
        "median_ms": round(statistics.median(times), 4),
        "min_ms": round(min(times), 4),
        "max_ms": round(max(times), 4),
    }
