"""Stages decode, decode-int8, decode-nf4, decode-reference: a decode step beside the floor that bandwidth sets.

The floor is what the step must read (weights once, every sequence's keys and values once) over the copy bandwidth
measured in this same process. Measured twice over: the bare step of the model, launch by launch (``batches``) and from
a CUDA graph (``in_graph``), and the true engine with sampling, scheduling and all (``engine``). The variants are the
quantizations and ``reference``: bfloat16 without a fused kernel.
"""

import gc
import time
from collections.abc import Callable
from typing import Any, cast, get_args

import torch
from torch import Tensor

from benchmarks.gpu.ceilings import copy_bandwidth
from benchmarks.gpu.models import decoder_bytes_per_step, fused, not_fused, random_model
from benchmarks.gpu.paged import PagedSequences
from benchmarks.gpu.stage import Stage, first_line, run, summary_ms, synchronize, times_ms
from benchmarks.gpu.streams import BLOCK_SIZE, rate_of
from sightline_kernels.dispatch import Mode
from sightline_models.kv import KvPool
from sightline_models.quantization_config import Quantization
from sightline_models.vlm import Vlm

DTYPE = torch.bfloat16
CONTEXT = 640
BATCHES = (1, 8, 32, 64, 128)
QUANTIZED_BATCHES = (1, 8, 32, 64)
QUICK_BATCHES = (1, 8)
STREAMS = (1, 64, 8, 32)
"""What the targets speak of first."""
SLOW_STREAMS = (1, 64)
"""Of the engine launch by launch."""


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


def bytes_of_step(model: Vlm, batch: int, dtype: torch.dtype, quantize: Quantization = "none") -> int:
    """Bytes a step can't avoid reading."""
    a_block = KvPool.bytes_per_block(model.config.decoder, block_size=BLOCK_SIZE, dtype=dtype)
    return decoder_bytes_per_step(model, dtype, quantize) + batch * CONTEXT * a_block // BLOCK_SIZE


def host_ms(step: DecodeStep, device: str, repeats: int) -> float:
    """Milliseconds the host needs to launch a step, the device's work not waited for."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(repeats):
        step()
    spent = time.perf_counter() - began
    synchronize(device)
    return round(spent * 1000 / repeats, 4)


@torch.inference_mode()
def capture_call(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """``call`` as a CUDA graph, its kernels built before. Raises RuntimeError when something can't be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def variant_of(stage: Stage) -> tuple[Quantization, Mode]:
    if stage.variant == "reference":
        return "none", "reference"
    quantize = stage.variant or "none"
    if quantize not in get_args(Quantization):
        raise ValueError(f"There is no variant {quantize}: take reference, int8 or nf4, or none of them.")
    return cast(Quantization, quantize), "auto"


class Bench:
    """One model, the floor under its steps, and the rows measured so far."""

    def __init__(self, stage: Stage, quantize: Quantization, model: Vlm, bandwidth: float) -> None:
        self.stage = stage
        self.quantize = quantize
        self.model = model
        self.bandwidth = bandwidth

    def floor_ms(self, batch: int) -> float:
        return bytes_of_step(self.model, batch, DTYPE, self.quantize) / self.bandwidth * 1000

    def fits(self, batch: int) -> str | None:
        """Why a step of ``batch`` can't be measured, or None."""
        if not self.stage.on_gpu:
            return None
        a_block = KvPool.bytes_per_block(self.model.config.decoder, block_size=BLOCK_SIZE, dtype=DTYPE)
        # Cache, and the copies of it that the reference attention gathers a layer at a time.
        wanted = 1.2 * batch * CONTEXT * a_block / BLOCK_SIZE + 2**31
        free_up()
        if torch.cuda.mem_get_info()[0] < wanted:
            return f"needs {wanted / 2**30:.0f} GiB more than the weights"
        return None

    def bare(self, batch: int) -> dict[str, Any]:
        """The model's step, launched by the host."""
        if (reason := self.fits(batch)) is not None:
            return {"batch": batch, "skipped": reason}
        try:
            return self._bare(batch)
        except Exception as error:
            self.stage.say(f"B={batch} failed: {first_line(error)}")
            return {"batch": batch, "failed": first_line(error)}

    def _bare(self, batch: int) -> dict[str, Any]:
        repeats = 20 if self.stage.on_gpu else 3
        step = DecodeStep(self.model, batch, DTYPE, self.stage.device)
        times = summary_ms(times_ms(step, self.stage.device, warmup=5 if self.stage.on_gpu else 1, repeats=repeats))
        row: dict[str, Any] = {
            "batch": batch,
            **times,
            "host_ms": host_ms(step, self.stage.device, max(3, repeats // 2)),
            "tokens_per_s": round(batch / times["median_ms"] * 1000, 1),
            "floor_ms": round(self.floor_ms(batch), 4),
            "share_of_floor": round(self.floor_ms(batch) / times["median_ms"], 4),
        }
        self.stage.say(
            f"B={batch}: {times['median_ms']:.2f} ms, {row['tokens_per_s']:,.0f} tokens/s, floor "
            f"{row['floor_ms']:.2f} ms ({row['share_of_floor']:.0%} of it reached), host {row['host_ms']:.2f} ms"
        )
        return row

    def in_graph(self, batch: int) -> dict[str, Any]:
        """The model's step replayed from a CUDA graph: what is left when nothing waits for the host."""
        try:
            step = DecodeStep(self.model, batch, DTYPE, self.stage.device)
            graph = capture_call(step)
            times = summary_ms(times_ms(graph.replay, self.stage.device, warmup=3, repeats=20))
        except Exception as error:
            return {"failed": first_line(error)}
        share = round(self.floor_ms(batch) / times["median_ms"], 4)
        self.stage.say(f"B={batch} from a CUDA graph: {times['median_ms']:.2f} ms ({share:.0%} of the floor reached)")
        return {**times, "share_of_floor": share}

    def engine(self, streams: int, *, fast: bool) -> dict[str, Any]:
        """The true engine, sampling at temperature 1."""
        row: dict[str, Any] = {"streams": streams, "fast": fast}
        if (reason := self.fits(streams)) is not None:
            return {**row, "skipped": reason}
        on_gpu = self.stage.on_gpu
        try:
            rate = rate_of(
                self.model,
                device=self.stage.device,
                dtype=DTYPE,
                streams=streams,
                context=CONTEXT,
                rounds=3 if on_gpu else 1,
                tokens=32 if on_gpu else 2,
                warmup=16 if on_gpu else 1,
                fast=fast,
            )
        except Exception as error:
            # Triton's own errors have no kind in common with torch's.
            self.stage.say(f"engine with {streams} streams failed: {first_line(error)}")
            return {**row, "failed": first_line(error)}
        floor_ms = self.floor_ms(streams)
        row |= {**rate.to_json(), "floor_ms": round(floor_ms, 4), "share_of_floor": round(floor_ms / rate.step_ms, 4)}
        self.stage.say(
            f"engine, {streams} streams{'' if fast else ', launch by launch'}: {rate.step_ms:.2f} ms, "
            f"{rate.tokens_per_s:,.0f} tokens/s ({row['share_of_floor']:.0%} of the floor reached, "
            f"{rate.graph_share:.0%} of steps from graphs)"
        )
        return row


def free_up() -> None:
    """Give back what dropped engines and graphs held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(stage: Stage) -> None:
    quantize, mode = variant_of(stage)
    whole = stage.on_gpu and not stage.quick
    num_bytes = 2**32 if whole else 2**26
    bandwidth = copy_bandwidth(stage.device, num_bytes=num_bytes)
    model = random_model(stage.shape, dtype=DTYPE, device=stage.device, quantize=quantize, mode=mode)
    bench = Bench(stage, quantize, model, bandwidth)
    stage.save(
        shape=stage.shape,
        quantization=quantize,
        kernels=mode,
        context=CONTEXT,
        copy_bytes_per_s=bandwidth,
        weight_bytes_per_step=decoder_bytes_per_step(model, DTYPE, quantize),
        fused=fused(model.decoder.kernels),
        not_fused=not_fused(model, DTYPE, stage.device, quantize),
    )
    engines: list[dict[str, Any]] = []
    # Launch by launch first: what a failed capture leaves of the device may serve nothing more.
    for streams in SLOW_STREAMS if stage.on_gpu else (2,):
        engines.append(bench.engine(streams, fast=False))
        stage.save(engine=engines)
    if mode == "auto":
        _measure_fast(
            bench, engines, (BATCHES if quantize == "none" else QUANTIZED_BATCHES) if whole else QUICK_BATCHES
        )
    # A ceiling is the most that was ever seen, and clocks rise with work.
    stage.save(copy_bytes_per_s_after=copy_bandwidth(stage.device, num_bytes=num_bytes))


def _measure_fast(bench: Bench, engines: list[dict[str, Any]], batches: tuple[int, ...]) -> None:
    stage = bench.stage
    rows: list[dict[str, Any]] = []
    for batch in batches:
        rows.append(bench.bare(batch))
        stage.save(batches=rows)
    for streams in STREAMS if stage.on_gpu else (2,):
        engines.append(bench.engine(streams, fast=True))
        stage.save(engine=engines)
    for row in rows if stage.on_gpu else ():
        if "median_ms" in row:
            row["in_graph"] = bench.in_graph(row["batch"])
            stage.save(batches=rows)


if __name__ == "__main__":
    run("decode", measure)
