"""Stage pictures: the encoder beside the matrix ceiling, a second turn on one picture, a burst of pictures.

Knows requests with pictures of random pixels. The engine is the true one; no file is decoded and nothing goes over
HTTP, so what is timed is the device's share.
"""

import itertools
import math
import statistics
import time
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from benchmarks.gpu.ceilings import matmul_rate
from benchmarks.gpu.decode import capture_call, free_up
from benchmarks.gpu.models import random_model
from benchmarks.gpu.stage import Stage, first_line, run, summary_ms, synchronize, times_ms
from benchmarks.gpu.step_profile import busy_ms, trace
from benchmarks.gpu.streams import (
    MIXED_STEP_TOKENS,
    SLACK,
    STEP_TOKENS,
    make_engine,
    random_ids,
    start_streams,
    tokens_of,
)
from sightline_models.config import VlmConfig
from sightline_models.images import Pixels
from sightline_models.vlm import Vlm
from sightline_server.engine.engine import Engine
from sightline_server.engine.types import (
    Event,
    FinishEvent,
    ImageSpan,
    PixelsWanted,
    Prompt,
    Request,
    SamplingParams,
)

DTYPE = torch.bfloat16
ENCODED_AT_ONCE = (1, 8, 32)
LEAD, QUESTION, ANSWER = 4, 60, 32
"""Tokens before a picture and after it, and of an answer."""
TURNS = 5
STREAMS, BURST = 32, 32
BEFORE_BURST, TIMED_TOKENS = 24, 160
ENCODER_CACHE_BYTES = 256 * 2**20
"""The server's default."""


class Album:
    """Random pictures by their digest, and requests that ask about them."""

    def __init__(self, model: Vlm) -> None:
        self._model = model
        self._pixels: dict[bytes, Pixels] = {}

    def new_picture(self) -> bytes:
        number, size = len(self._pixels), self._model.config.vision.image_size
        digest = number.to_bytes(16, "big")
        self._pixels[digest] = np.random.default_rng(number).integers(0, 256, (size, size, 3), dtype=np.uint8)
        return digest

    def prompt(self, digest: bytes, *turns: tuple[int, ...]) -> Prompt:
        """A few tokens, the picture, then all ``turns``."""
        config = self._model.config
        length = config.num_image_tokens
        ids = random_ids(self._model, LEAD, seed=0) + (config.image_token_id,) * length
        return Prompt(ids + sum(turns, ()), (ImageSpan(LEAD, length, digest),))

    def answer(self, engine: Engine, events: Iterable[Event]) -> None:
        """Give the engine the pixels it asks for."""
        for event in events:
            if isinstance(event, PixelsWanted):
                engine.provide(event.request_id, event.digest, self._pixels[event.digest])


def encoder_flops(config: VlmConfig) -> int:
    """Floating-point operations of one picture: tower and projector, matrix products and attention alone."""
    tower, projector = config.vision, config.projector
    tokens, width = tower.num_patches + 1, tower.hidden_size
    linears = 4 * width * width + 2 * width * tower.intermediate_size
    layer = 2 * tokens * linears + 4 * tokens * tokens * width
    patches = 2 * tower.num_patches * 3 * tower.patch_size**2 * width
    project = (
        2 * config.num_image_tokens * (projector.in_size * projector.out_size + projector.out_size * projector.out_size)
    )
    return max(config.feature_depths) * layer + patches + project


def measure_encoder(stage: Stage, model: Vlm) -> list[dict[str, Any]]:
    whole = stage.on_gpu and not stage.quick
    ceiling = matmul_rate(stage.device, size=8192 if whole else 512, dtype=DTYPE)
    flops, size = encoder_flops(model.config), model.config.vision.image_size
    stage.save(matmul_flops=ceiling, flops_per_picture=flops)
    rows: list[dict[str, Any]] = []
    for count in ENCODED_AT_ONCE if stage.on_gpu else (1, 2):
        generator = torch.Generator(device=stage.device).manual_seed(count)
        pixels_NYXC = torch.randint(
            0, 256, (count, size, size, 3), dtype=torch.uint8, device=stage.device, generator=generator
        )

        def encode(pixels_NYXC: torch.Tensor = pixels_NYXC) -> torch.Tensor:
            with torch.inference_mode():
                return model.encode_images(pixels_NYXC)

        times = summary_ms(times_ms(encode, stage.device, warmup=3, repeats=10 if stage.on_gpu else 2))
        row: dict[str, Any] = {"pictures": count, **times}
        best = times["median_ms"]
        if stage.on_gpu:
            try:
                graph = capture_call(encode)
                row["in_graph"] = summary_ms(times_ms(graph.replay, "cuda", warmup=2, repeats=10))
            except RuntimeError as error:
                row["in_graph"] = {"failed": first_line(error)}
        row["pictures_per_s"] = round(count / best * 1000, 1)
        row["share_of_ceiling"] = round(flops * count / (best / 1000) / ceiling, 4)
        rows.append(row)
        stage.save(encoder=rows)
        stage.say(
            f"{count} pictures: {best:.2f} ms, {row['pictures_per_s']:,.0f}/s, {row['share_of_ceiling']:.0%} of "
            f"{ceiling / 1e12:.0f} TFLOP/s"
        )
    return rows


def measure_second_turn(stage: Stage, model: Vlm) -> None:
    """From handing over the second question to its first token, the picture and the first turn in the cache."""
    album = Album(model)
    length = model.config.num_image_tokens + LEAD + 2 * QUESTION + 2 * ANSWER + 16
    engine = make_engine(
        model,
        device=stage.device,
        dtype=DTYPE,
        streams=2 * TURNS + 4,
        max_len=length,
        # Results a step late would time the step after, too.
        fast=False,
        encoder_cache_bytes=ENCODER_CACHE_BYTES,
    )
    turns: list[dict[str, Any]] = []
    # The first is not counted: its kernels are built in it.
    for number in range(1 + TURNS):
        digest = album.new_picture()
        question = random_ids(model, QUESTION, seed=2 * number + 1)
        answered, _, first = ask(engine, album, stage.device, f"{number}/1", album.prompt(digest, question))
        follow_up = random_ids(model, QUESTION, seed=2 * number + 2)
        prompt = album.prompt(digest, question, answered, follow_up)
        _, cached, second = ask(engine, album, stage.device, f"{number}/2", prompt)
        if number:
            told = {"first_ms": first["ms"], "second_ms": second["ms"], "device_ms": second["device_ms"]}
            turns.append({**told, "cached_tokens": cached, "prompt_tokens": len(prompt.token_ids)})
            stage.save(turns=turns)
    medians = {name: statistics.median(turn[name] for turn in turns) for name in ("first_ms", "second_ms", "device_ms")}
    stage.save(second_turn=medians)
    try:
        stage.save(second_turn_busy_ms=trace_second_turn(stage, model, engine, album))
    except RuntimeError as error:
        # A machine may not let its work be traced; the figure above needs no trace.
        stage.say(f"a second turn could not be traced: {first_line(error)}")
    stage.say(
        f"first token of a first turn after {medians['first_ms']:.1f} ms, of a second after {medians['second_ms']:.1f} "
        f"ms ({turns[-1]['cached_tokens']} of {turns[-1]['prompt_tokens']} tokens cached)"
    )


def trace_second_turn(stage: Stage, model: Vlm, engine: Engine, album: Album) -> float:
    """Milliseconds that the device works for such a turn: without the time it waits for launches."""
    digest, question = album.new_picture(), random_ids(model, QUESTION, seed=1000)
    answered, _, _ = ask(engine, album, stage.device, "traced/1", album.prompt(digest, question))
    prompt = album.prompt(digest, question, answered, random_ids(model, QUESTION, seed=1001))
    return busy_ms(trace(lambda: ask(engine, album, stage.device, "traced/2", prompt, answer_len=1), stage.device))


def ask(
    engine: Engine, album: Album, device: str, name: str, prompt: Prompt, answer_len: int = ANSWER
) -> tuple[tuple[int, ...], int, dict[str, float]]:
    """One request alone: its tokens, those of its prompt that were cached, and how long its first token took."""
    on_gpu = device != "cpu"
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if on_gpu else []
    synchronize(device)
    began = time.perf_counter()
    if on_gpu:
        marks[0].record()
    engine.add(Request(id=name, prompt=prompt, sampling=SamplingParams(max_tokens=answer_len, temperature=1.0, seed=7)))
    tokens: list[int] = []
    first: dict[str, float] = {}
    while True:
        events = engine.step()
        album.answer(engine, events)
        tokens += [event.token_id for event in tokens_of(events)]
        if tokens and not first:
            first["ms"] = (time.perf_counter() - began) * 1000
            first["device_ms"] = first["ms"]
            if on_gpu:
                marks[1].record()
                torch.cuda.synchronize()
                first["device_ms"] = marks[0].elapsed_time(marks[1])
        for event in events:
            if isinstance(event, FinishEvent):
                return tuple(tokens), event.usage.cached_tokens, first


def measure_burst(stage: Stage, model: Vlm, name: str, mixed_step_tokens: int) -> None:
    """Gaps between the tokens of streams that decode while pictures come in, all at once."""
    free_up()
    streams, burst = (STREAMS, BURST) if stage.on_gpu else (2, 2)
    timed, before = (TIMED_TOKENS, BEFORE_BURST) if stage.on_gpu else (12, 4)
    album = Album(model)
    context = 640
    # Those whose prompts are computed first decode while the others' are.
    answer_len = timed + streams * context // mixed_step_tokens + 4 * SLACK
    engine = make_engine(
        model,
        device=stage.device,
        dtype=DTYPE,
        streams=streams + burst,
        max_len=max(context + answer_len, model.config.num_image_tokens + LEAD + QUESTION + ANSWER) + 1,
        encoder_cache_bytes=ENCODER_CACHE_BYTES,
        mixed_step_tokens=mixed_step_tokens,
    )
    # Once before, small, so that no kernel is built while it counts.
    ask(engine, album, stage.device, "warm-up", album.prompt(album.new_picture(), random_ids(model, QUESTION, seed=1)))
    names = start_streams(engine, model, streams=streams, prompt_len=context, answer_len=answer_len)
    arrivals: dict[str, list[float]] = {stream: [] for stream in names}
    requests = [
        Request(
            id=f"picture-{index}",
            prompt=album.prompt(album.new_picture(), random_ids(model, QUESTION, seed=100 + index)),
            sampling=SamplingParams(max_tokens=ANSWER, temperature=1.0, seed=index),
        )
        for index in range(burst)
    ]
    burst_at, last_first_token = math.inf, 0.0
    waiting = {request.id for request in requests}
    while min(len(times) for times in arrivals.values()) < timed:
        if requests and min(len(times) for times in arrivals.values()) >= before:
            burst_at = time.perf_counter()
            for request in requests:
                engine.add(request)
            requests = []
        events = engine.step()
        now = time.perf_counter()
        album.answer(engine, events)
        for event in tokens_of(events):
            if event.request_id in arrivals:
                arrivals[event.request_id].append(now)
            elif event.request_id in waiting:
                waiting.remove(event.request_id)
                last_first_token = now
        assert engine.has_work, "the streams ended before the burst was measured"
    told = summarize_gaps(list(arrivals.values()), burst_at, last_first_token)
    told |= {
        "streams": streams,
        "pictures": burst,
        "mixed_step_tokens": mixed_step_tokens,
        "pictures_unanswered": len(waiting),
    }
    stage.save(**{name: told})
    stage.say(
        f"{burst} pictures into {streams} streams, {mixed_step_tokens} tokens of prompts a mixed step: gaps p50 "
        f"{told['p50_ms']:.1f} ms, p99 {told['p99_ms']:.1f} ({told['p99_over_p50']:.2f}x), longest "
        f"{told['max_ms']:.1f}; all answered after {told['burst_ms']:.0f} ms"
    )


def summarize_gaps(arrivals: list[list[float]], burst_at: float, answered_at: float) -> dict[str, float]:
    """Percentiles over all gaps of all streams, and over those that end while the burst is worked on."""
    gaps = [
        ((later - earlier) * 1000, burst_at <= later <= answered_at)
        for times in arrivals
        for earlier, later in itertools.pairwise(times)
    ]
    every = [gap for gap, _ in gaps]
    during = [gap for gap, inside in gaps if inside] or every
    p50, p99 = (float(np.percentile(every, share)) for share in (50, 99))
    return {
        "p50_ms": round(p50, 3),
        "p99_ms": round(p99, 3),
        "p99_over_p50": round(p99 / p50, 4),
        "max_ms": round(max(every), 3),
        "burst_p50_ms": round(float(np.percentile(during, 50)), 3),
        "burst_ms": round((answered_at - burst_at) * 1000, 1),
    }


def measure(stage: Stage) -> None:
    model = random_model(stage.shape, dtype=DTYPE, device=stage.device)
    stage.save(shape=stage.shape)
    measure_encoder(stage, model)
    free_up()
    measure_second_turn(stage, model)
    # The first time, libraries load what they need for shapes not seen before.
    measure_burst(stage, model, "burst_cold", MIXED_STEP_TOKENS)
    measure_burst(stage, model, "burst", MIXED_STEP_TOKENS)
    # What the bound of mixed steps does for the gaps, and costs the pictures.
    measure_burst(stage, model, "burst_whole_steps", STEP_TOKENS)


if __name__ == "__main__":
    run("pictures", measure)
