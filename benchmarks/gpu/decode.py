"""Stage 5: the time of one decode step at several batches, beside the floor that memory bandwidth sets.

The floor is what the step must read (weights once, every sequence's keys and values once) over the copy bandwidth
measured in this same process. ``in_graph_ms`` is the same step replayed from a CUDA graph: what is left when nothing
waits for the host to launch kernels.
"""

import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.ceilings import copy_bandwidth
from benchmarks.gpu.models import decoder_bytes_per_step, random_model
from benchmarks.gpu.paged import PagedSequences
from benchmarks.gpu.stage import Stage, run, summary_ms, synchronize, times_ms
from sightline_models.kv import KvPool
from sightline_models.vlm import Vlm

CONTEXT = 640
BATCHES = (1, 8, 32, 64, 128)
QUICK_BATCHES = (1, 8)
BLOCK_SIZE = 16


class DecodeStep:
    """One decode step of ``batch`` sequences at context CONTEXT, ready to run again and again."""

    def __init__(self, model: Vlm, batch: int, dtype: torch.dtype, device: str) -> None:
        config = model.config.decoder
        self._model = model
        self._cache = PagedSequences(
            config, num_sequences=batch, max_len=CONTEXT, dtype=dtype, device=device, block_size=BLOCK_SIZE
        )
        self._cache.fill()
        self._layout, self._positions_T = self._cache.layout((1,) * batch, (CONTEXT,) * batch)
        self._token_ids_T = torch.randint(0, config.vocab_size, (batch,), device=device)

    @torch.inference_mode()
    def __call__(self) -> Tensor:
        """Greedy next tokens."""
        hidden_TD = self._model.embed(self._token_ids_T)
        hidden_TD = self._model(hidden_TD, self._positions_T, self._cache.kv, self._layout)
        return self._model.logits(hidden_TD).argmax(-1)


def bytes_of_step(model: Vlm, batch: int, dtype: torch.dtype) -> int:
    """Bytes a step can't avoid reading."""
    a_block = KvPool.bytes_per_block(model.config.decoder, block_size=BLOCK_SIZE, dtype=dtype)
    return decoder_bytes_per_step(model, dtype) + batch * CONTEXT * a_block // BLOCK_SIZE


def host_ms(step: DecodeStep, device: str, repeats: int) -> float:
    """Milliseconds the host needs to launch a step, the device's work not waited for."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    spent = time.perf_counter() - began
    synchronize(device)
    return round(spent * 1000 / repeats, 4)


def in_graph_ms(step: DecodeStep, repeats: int) -> dict[str, float]:
    """The step replayed from a CUDA graph. Raises RuntimeError when something in it can't be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return summary_ms(times_ms(graph.replay, "cuda", warmup=3, repeats=repeats))


def measure(stage: Stage) -> None:
    dtype = torch.bfloat16
    bandwidth = copy_bandwidth(stage.device, num_bytes=2**32 if stage.on_gpu and not stage.quick else 2**26)
    model = random_model(stage.shape, dtype=dtype, device=stage.device)
    stage.save(
        shape=stage.shape,
        context=CONTEXT,
        copy_bytes_per_s=bandwidth,
        weight_bytes_per_step=decoder_bytes_per_step(model, dtype),
    )
    rows: list[dict[str, Any]] = []
    repeats = 20 if stage.on_gpu else 3
    batches = BATCHES if stage.on_gpu and not stage.quick else QUICK_BATCHES
    for batch in batches:
        rows.append(_measure_batch(stage, model, batch, dtype, bandwidth, repeats))
        stage.save(batches=rows)
    if stage.on_gpu:
        # Last, as a failed capture may leave the device unusable.
        for row in rows:
            if "skipped" not in row:
                row["in_graph"] = _try_graph(model, row["batch"], dtype, repeats)
                stage.save(batches=rows)
                stage.say(f"B={row['batch']} from a CUDA graph: {row['in_graph']}")


def _measure_batch(
    stage: Stage, model: Vlm, batch: int, dtype: torch.dtype, bandwidth: float, repeats: int
) -> dict[str, Any]:
    num_bytes = bytes_of_step(model, batch, dtype)
    if stage.on_gpu:
        # Cache, and the copies of it that the reference attention gathers a layer at a time.
        wanted = 1.2 * (num_bytes - decoder_bytes_per_step(model, dtype)) + 2**30
        if torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated() < wanted:
            return {"batch": batch, "skipped": f"needs {wanted / 2**30:.0f} GiB more than the weights"}
        torch.cuda.reset_peak_memory_stats()
    step = DecodeStep(model, batch, dtype, stage.device)
    times = summary_ms(times_ms(step, stage.device, warmup=5 if stage.on_gpu else 1, repeats=repeats))
    floor_ms = num_bytes / bandwidth * 1000
    row: dict[str, Any] = {
        "batch": batch,
        **times,
        "host_ms": host_ms(step, stage.device, max(3, repeats // 2)),
        "tokens_per_s": round(batch / times["median_ms"] * 1000, 1),
        "floor_ms": round(floor_ms, 4),
        "share_of_floor": round(floor_ms / times["median_ms"], 4),
    }
    if stage.on_gpu:
        row["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
    stage.say(
        f"B={batch}: {times['median_ms']:.2f} ms, {row['tokens_per_s']:,.0f} tokens/s, floor {floor_ms:.2f} ms "
        f"({row['share_of_floor']:.0%} of it reached), host {row['host_ms']:.2f} ms"
    )
    return row


def _try_graph(model: Vlm, batch: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    try:
        return dict(in_graph_ms(DecodeStep(model, batch, dtype, "cuda"), repeats))
    except RuntimeError as error:
        return {"failed": str(error)[:500]}


if __name__ == "__main__":
    run("decode", measure)
