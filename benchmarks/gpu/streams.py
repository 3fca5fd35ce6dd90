"""Engines in the middle of their work: many streams decoding, and how fast their tokens come.

Knows requests and tokens. Knows no kernel, no floor, and nothing of what a rate is compared with.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from sightline_models.vlm import Vlm
from sightline_server.engine.engine import Engine
from sightline_server.engine.load import assemble
from sightline_server.engine.types import (
    EngineConfig,
    Event,
    FinishEvent,
    FinishReason,
    Prompt,
    Request,
    SamplingParams,
    TokenEvent,
)

BLOCK_SIZE = 16
STEP_TOKENS, MIXED_STEP_TOKENS = 2048, 512
"""The server's own bounds of a step on a GPU: of any, and of prompts in one that continues answers too."""
SLACK = 16
"""Tokens a stream may get beyond those that are counted: a step's results may come a step late."""


@dataclass(frozen=True)
class Rate:
    """How fast tokens came, stream after stream in lockstep."""

    tokens_per_s: float
    step_ms: float
    """Median over the rounds, for a token of every stream."""
    round_ms: tuple[float, ...]
    graph_share: float
    """Of the steps, those that replayed a graph."""

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def make_engine(
    model: Vlm,
    *,
    device: str,
    dtype: torch.dtype,
    streams: int,
    max_len: int,
    fast: bool = True,
    deterministic: bool = False,
    encoder_cache_bytes: int = 0,
    mixed_step_tokens: int = STEP_TOKENS,
) -> Engine:
    """An idle engine with a cache for ``streams`` sequences of ``max_len``.

    ``fast``: as a server on a GPU runs it, steps as graphs and results a step late; else launch by launch.
    """
    # As the server's are, whatever the streams need of it: a graph is made for the longest sequence there may be.
    longest = model.config.decoder.max_position_embeddings
    config = EngineConfig(
        num_blocks=max(streams * (-(-max_len // BLOCK_SIZE) + 1), -(-longest // BLOCK_SIZE)),
        block_size=BLOCK_SIZE,
        max_model_len=longest,
        max_step_tokens=STEP_TOKENS,
        mixed_step_tokens=mixed_step_tokens,
        max_running=streams,
        max_queue=streams,
        encoder_cache_bytes=encoder_cache_bytes,
        deterministic=deterministic,
        overlap=fast,
        graphs=fast and not deterministic,
    )
    return assemble(model, config, device=torch.device(device), dtype=dtype)


def random_ids(model: Vlm, count: int, seed: int) -> tuple[int, ...]:
    """Token ids without the picture's."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(0, model.config.decoder.vocab_size, (count,), generator=generator)
    drawn[drawn == model.config.image_token_id] = 0
    return tuple(drawn.tolist())


def start_streams(engine: Engine, model: Vlm, *, streams: int, prompt_len: int, answer_len: int) -> list[str]:
    """Add as many random text requests and step until each has its first token. Returns their ids."""
    names = [f"stream-{index}" for index in range(streams)]
    for index, name in enumerate(names):
        sampling = SamplingParams(max_tokens=answer_len, temperature=1.0, seed=index)
        engine.add(Request(id=name, prompt=Prompt(random_ids(model, prompt_len, index)), sampling=sampling))
    begun: set[str] = set()
    while len(begun) < streams:
        begun.update(event.request_id for event in tokens_of(engine.step()))
    return names


def tokens_of(events: Iterable[Event]) -> list[TokenEvent]:
    """The tokens among ``events``. Raises RuntimeError when a request failed: no figure of the others would hold."""
    tokens = []
    for event in events:
        if isinstance(event, FinishEvent) and event.reason is FinishReason.ERROR:
            raise RuntimeError(f"request {event.request_id} failed: {event.error_message}")
        if isinstance(event, TokenEvent):
            tokens.append(event)
    return tokens


def measure_rate(engine: Engine, *, streams: int, warmup: int, rounds: int, tokens: int) -> Rate:
    """Time ``rounds`` of ``tokens`` for every stream. The streams are under way and stay so.

    Nothing is waited for but the tokens themselves, and a round ends when its last one has reached the host.
    """
    _take(engine, streams * warmup)
    before = engine.stats()
    spent = []
    for _ in range(rounds):
        began = time.perf_counter()
        _take(engine, streams * tokens)
        spent.append((time.perf_counter() - began) * 1000 / tokens)
    after = engine.stats()
    step_ms = statistics.median(spent)
    replayed = after.graph_steps_total - before.graph_steps_total
    return Rate(
        tokens_per_s=round(streams / step_ms * 1000, 1),
        step_ms=round(step_ms, 4),
        round_ms=tuple(round(each, 4) for each in spent),
        graph_share=replayed / max(1, after.steps_total - before.steps_total),
    )


def _take(engine: Engine, count: int) -> None:
    while count > 0:
        count -= len(tokens_of(engine.step()))
        assert engine.has_work, "the streams ended before they were measured"


def rate_of(
    model: Vlm,
    *,
    device: str,
    dtype: torch.dtype,
    streams: int,
    context: int,
    rounds: int,
    tokens: int,
    warmup: int = 16,
    fast: bool = True,
    deterministic: bool = False,
) -> Rate:
    """The rate of an engine made for it, its streams at about ``context`` tokens half way through the measurement."""
    # Those whose prompts are computed first decode while the others' are.
    early = streams * context // STEP_TOKENS + SLACK
    prompt_len = max(1, context - early // 2 - warmup - rounds * tokens // 2)
    answer_len = early + warmup + rounds * tokens
    engine = make_engine(
        model,
        device=device,
        dtype=dtype,
        streams=streams,
        max_len=prompt_len + answer_len + 1,
        fast=fast,
        deterministic=deterministic,
    )
    start_streams(engine, model, streams=streams, prompt_len=prompt_len, answer_len=answer_len)
    return measure_rate(engine, streams=streams, warmup=warmup, rounds=rounds, tokens=tokens)
