"""Stage 6: what one decode step of the true engine does: kernels, waits for the device, idle share.

Reads torch.profiler's trace. A kernel belongs to the step whose host code launched it, by correlation id, so work that
the device does after the host moved on is counted where it came from.
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

from benchmarks.gpu.models import random_model
from benchmarks.gpu.stage import Stage, run, synchronize
from sightline_server.engine.engine import Engine
from sightline_server.engine.load import assemble
from sightline_server.engine.types import EngineConfig, Prompt, Request, SamplingParams, TokenEvent

STEP = "engine_step"
BATCH, CONTEXT = 32, 640
PROFILED_STEPS = 4
DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")
HOST_CALLS = ("cuda_runtime", "cuda_driver")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize")


def make_engine(shape: str, *, batch: int, context: int, device: str) -> Engine:
    """An engine in the middle of its work: ``batch`` random requests of about ``context`` tokens, all decoding."""
    model = random_model(shape, dtype=torch.bfloat16, device=device)
    block_size, room = 16, 64
    config = EngineConfig(
        num_blocks=batch * (-(-(context + room) // block_size) + 1),
        block_size=block_size,
        max_model_len=context + room,
        max_step_tokens=2048,
        max_running=batch,
        max_queue=batch,
        encoder_cache_bytes=0,
    )
    engine = assemble(model, config, device=torch.device(device), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    for index in range(batch):
        drawn = torch.randint(0, model.config.decoder.vocab_size, (context,), generator=generator)
        drawn[drawn == model.config.image_token_id] = 0
        sampling = SamplingParams(max_tokens=room, temperature=1.0, seed=index)
        engine.add(Request(id=str(index), prompt=Prompt(tuple(drawn.tolist())), sampling=sampling))
    begun: set[str] = set()
    while len(begun) < batch:
        begun.update(event.request_id for event in engine.step() if isinstance(event, TokenEvent))
    return engine


def record_trace(step: Callable[[], object], device: str, path: Path) -> None:
    """Profile ``PROFILED_STEPS`` calls, each waited for, and write the trace."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device != "cpu":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(PROFILED_STEPS):
            with torch.profiler.record_function(STEP):
                step()
            synchronize(device)
    profiler.export_chrome_trace(str(path))


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
        "longest_kernels_us": {name: round(spent / max(1, len(steps)), 1) for name, spent in longest.most_common(15)},
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
    waits = Counter(call["name"] for call in mine if call["name"] in WAITS)
    told: dict[str, Any] = {
        "host_us": round(end - begin, 1),
        "operators": sum(begin <= event["ts"] < end for event in operators),
        "kernels": sum(event["cat"] == "kernel" for event in launched),
        "waits": sum(waits.values()),
        "wait_us": round(sum(call["dur"] for call in mine if call["name"] in WAITS), 1),
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
    batch = BATCH if stage.on_gpu else 2
    stage.save(shape=stage.shape, batch=batch, context=CONTEXT)
    engine = make_engine(stage.shape, batch=batch, context=CONTEXT, device=stage.device)
    for _ in range(3):
        engine.step()
    with tempfile.TemporaryDirectory(prefix="sightline-trace-") as folder:
        path = Path(folder) / "trace.json"
        record_trace(engine.step, stage.device, path)
        events = json.loads(path.read_text())["traceEvents"]
    told = read_trace(events)
    stage.save(**told)
    if stage.trace_path is not None:
        stage.trace_path.write_bytes(gzip.compress(json.dumps({"traceEvents": events}).encode()))
    stage.say(", ".join(f"{name} {value:.4g}" for name, value in told["median"].items()))


if __name__ == "__main__":
    run("step_profile", measure)
