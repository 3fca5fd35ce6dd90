"""Stage profile: what a decode step of the true engine does: kernels, waits for the device, idle share.

Reads torch.profiler's trace. A kernel belongs to the step whose host code launched it, by correlation id, so work that
the device does after the host moved on is counted where it came from. The idle share of the whole is taken on the
device's own clock line, over all steps but the first: nothing is waited for between steps, as in a server.
"""

import gzip
import json
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.models import fused, random_model
from benchmarks.gpu.stage import Stage, run, synchronize
from benchmarks.gpu.streams import SLACK, STEP_TOKENS, make_engine, start_streams, tokens_of

STEP = "engine_step"
BATCH, CONTEXT = 64, 640
PROFILED_STEPS = 12
WARMUP_STEPS = 8
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
HOST_CALLS = ("cuda_runtime", "cuda_driver")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cuStreamSynchronize", "cuCtxSynchronize")
"""Of these nothing may be left in a step: all that the device was given is waited for."""
EVENT_WAITS = ("cudaEventSynchronize", "cuEventSynchronize")
"""A wait for the results of the step before, while the device has the next one already."""
GRAPH_LAUNCHES = ("cudaGraphLaunch", "cuGraphLaunch")
LONG_GAP_US = 10.0
"""Between kernels the device rests a microsecond or two; a longer gap is a wait for the host."""


def trace(work: Callable[[], object], device: str) -> list[dict[str, Any]]:
    """The profiler's events of ``work`` and of all that the device does for it."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device != "cpu":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        work()
        synchronize(device)
    with tempfile.TemporaryDirectory(prefix="sightline-trace-") as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text())["traceEvents"]
    return events


def run_steps(step: Callable[[], object]) -> None:
    """``PROFILED_STEPS`` calls, one after another."""
    for _ in range(PROFILED_STEPS):
        with torch.profiler.record_function(STEP):
            step()


def busy_ms(events: list[dict[str, Any]]) -> float:
    """Milliseconds that the device worked."""
    spans = [(event["ts"], event["ts"] + event["dur"]) for event in events if event.get("cat") in DEVICE_WORK]
    return covered(sorted(spans)) / 1000


def read_trace(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the profiled steps, and the names of the kernels that took longest."""
    ranges = [
        (event["ts"], event["ts"] + event["dur"])
        for event in events
        if event.get("name") == STEP and event.get("cat") == "user_annotation"
    ]
    calls = [event for event in events if event.get("cat") in HOST_CALLS]
    work: dict[Any, list[dict[str, Any]]] = {}
    for event in events:
        if event.get("cat") in DEVICE_WORK:
            work.setdefault(event["args"].get("correlation"), []).append(event)
    operators = [event for event in events if event.get("cat") == "cpu_op"]
    ranges.sort()
    steps = [_read_step(begin, end, calls, work, operators) for begin, end in ranges]
    longest: Counter[str] = Counter()
    for group in work.values():
        for event in group:
            longest[event["name"][:120]] += event["dur"]
    shared = set.intersection(*(set(step) for step in steps)) if steps else set()
    medians = {key: statistics.median(step[key] for step in steps) for key in sorted(shared)}
    return {
        "steps": steps,
        "median": medians,
        "window": read_window(ranges, [event for group in work.values() for event in group]),
        "longest_kernels_us": {name: round(spent / max(1, len(steps)), 1) for name, spent in longest.most_common(15)},
    }


def read_window(ranges: list[tuple[float, float]], work: list[dict[str, Any]]) -> dict[str, float]:
    """How much of the time from the second step's start to the last one's end no device work ran, and how much of
    that lies in gaps too long to be the device's own. Nothing where there is no such time or work."""
    if len(ranges) < 2 or not work:
        return {}
    opened, closed = ranges[1][0], ranges[-1][1]
    spans = sorted(
        (max(opened, event["ts"]), min(closed, event["ts"] + event["dur"]))
        for event in work
        if event["ts"] < closed and event["ts"] + event["dur"] > opened
    )
    long_us, reached = 0.0, opened
    for start, stop in [*spans, (closed, closed)]:
        long_us += start - reached if start - reached > LONG_GAP_US else 0.0
        reached = max(reached, stop)
    whole = closed - opened
    return {
        "steps": len(ranges) - 1,
        "step_us": round(whole / (len(ranges) - 1), 1),
        "idle_share": 1 - covered(spans) / whole,
        "idle_share_in_long_gaps": long_us / whole,
    }


def _read_step(
    begin: float,
    end: float,
    calls: list[dict[str, Any]],
    work: dict[Any, list[dict[str, Any]]],
    operators: list[dict[str, Any]],
) -> dict[str, Any]:
    mine = [call for call in calls if begin <= call["ts"] < end]
    launched = [event for call in mine for event in work.get(call["args"].get("correlation"), ())]
    copies = Counter(event["name"] for event in launched if event["cat"] == "gpu_memcpy")
    named = Counter(call["name"].split("_v")[0] for call in mine)
    told: dict[str, Any] = {
        "host_us": round(end - begin, 1),
        "operators": sum(begin <= event["ts"] < end for event in operators),
        "kernels": sum(event["cat"] == "kernel" for event in launched),
        "graphs": sum(named[name] for name in GRAPH_LAUNCHES),
        "waits": sum(named[name] for name in WAITS),
        "event_waits": sum(named[name] for name in EVENT_WAITS),
        "wait_us": round(sum(call["dur"] for call in mine if call["name"] in WAITS + EVENT_WAITS), 1),
        "copies_to_host": sum(count for name, count in copies.items() if "DtoH" in name),
        "copies_to_device": sum(count for name, count in copies.items() if "HtoD" in name),
    }
    if launched:
        spans = sorted((event["ts"], event["ts"] + event["dur"]) for event in launched)
        busy, span = covered(spans), max(stop for _, stop in spans) - spans[0][0]
        told |= {"device_busy_us": round(busy, 1), "device_span_us": round(span, 1), "idle_share": 1 - busy / span}
        # Of the whole step: what the device idles before its first kernel and after its last counts too.
        told["idle_share_of_step"] = 1 - busy / max(end - begin, span)
    return told


def covered(spans: list[tuple[float, float]]) -> float:
    """Length of the union of ``spans``, which are sorted by start."""
    total, reached = 0.0, float("-inf")
    for start, stop in spans:
        total += max(0.0, stop - max(start, reached))
        reached = max(reached, stop)
    return total


def measure(stage: Stage) -> None:
    batch, dtype = (BATCH if stage.on_gpu else 2), torch.bfloat16
    model = random_model(stage.shape, dtype=dtype, device=stage.device)
    stage.save(shape=stage.shape, batch=batch, context=CONTEXT, fused=fused(model.decoder.kernels))
    answer_len = WARMUP_STEPS + PROFILED_STEPS + batch * CONTEXT // STEP_TOKENS + SLACK
    engine = make_engine(
        model, device=stage.device, dtype=dtype, streams=batch, max_len=CONTEXT + answer_len + 1, fast=True
    )
    start_streams(engine, model, streams=batch, prompt_len=CONTEXT, answer_len=answer_len)
    for _ in range(WARMUP_STEPS):
        tokens_of(engine.step())
    events = trace(lambda: run_steps(engine.step), stage.device)
    told = read_trace(events)
    stage.save(**told)
    if stage.trace_path is not None:
        stage.trace_path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    stage.say(", ".join(f"{name} {value:.4g}" for name, value in {**told["median"], **told["window"]}.items()))


if __name__ == "__main__":
    run("profile", measure)
