"""Drives an Engine without processes: pictures, prompts, and a loop that answers its questions for pixels."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from sightline_kernels.dispatch import REFERENCES
from sightline_kernels.layout import PagedLayout
from sightline_models.config import Normalization
from sightline_models.images import Pixels
from sightline_models.vlm import Vlm
from sightline_server.engine.engine import Engine
from sightline_server.engine.load import assemble
from sightline_server.engine.types import (
    EngineConfig,
    FinishEvent,
    FinishReason,
    ImageSpan,
    PixelsWanted,
    Prompt,
    Request,
    SamplingParams,
    TokenEvent,
)

CLIP = Normalization(
    mean=(0.48145466, 0.4578275, 0.40821073), std=(0.26862954, 0.26130258, 0.27577711), rescale_factor=1 / 255
)


def make_engine(model: Vlm, *, device: str = "cpu", **bounds: Any) -> Engine:
    """An engine around ``model`` with small bounds, each of which a test may set."""
    values: dict[str, Any] = {
        "num_blocks": 256,
        "block_size": 4,
        "max_model_len": 512,
        "max_step_tokens": 512,
        "max_running": 64,
        "max_queue": 64,
        "encoder_cache_bytes": 2**24,
    }
    dtype = next(model.parameters()).dtype
    threads, compiles = bounds.pop("threads", 1), bounds.pop("compiles", False)
    config = EngineConfig(**values | bounds)
    recorder = CallAgain() if config.graphs and device != "cuda" else None
    return assemble(
        model,
        config,
        device=torch.device(device),
        dtype=dtype,
        threads=threads,
        recorder=recorder,
        compiles=compiles,
    )


class CallAgain:
    """Stands in for CUDA graphs where there is no GPU: does the work again, into the tensors of the first time.

    As in a memory pool that recordings share, a replay spoils what all of them left.
    """

    def __init__(self) -> None:
        self._all: list[torch.Tensor] = []

    def record(
        self, work: Callable[[], tuple[torch.Tensor, ...]]
    ) -> tuple[tuple[torch.Tensor, ...], Callable[[], None]]:
        results = tuple(result.clone() for result in work())
        self._all += results

        def replay() -> None:
            for tensor in self._all:
                tensor.fill_(torch.nan if tensor.is_floating_point() else -(2**40))
            for result, again in zip(results, work(), strict=True):
                result.copy_(again)

        return results, replay


def attend_by_device(
    q_THD: torch.Tensor, k_cache_NPGD: torch.Tensor, v_cache_NPGD: torch.Tensor, layout: PagedLayout, scale: float
) -> torch.Tensor:
    """The reference's attention from device tensors alone, as a recording needs it: the host's lengths are bounds."""
    contexts = tuple(layout.context_len_B.tolist())
    assert all(known <= bound for known, bound in zip(contexts, layout.context_lens, strict=True))
    seen = dataclasses.replace(layout, context_lens=contexts, memo={})
    return REFERENCES.paged_attention(q_THD, k_cache_NPGD, v_cache_NPGD, seen, scale)


RECORDABLE = dataclasses.replace(REFERENCES, paged_attention=attend_by_device)


def picture(size: int, seed: int) -> Pixels:
    """Seeded uint8 noise [size, size, 3]."""
    return np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)


def digest_of(pixels: Pixels) -> bytes:
    """Any function of the pixels that tells them apart will do for an engine."""
    import hashlib

    return hashlib.sha256(pixels.tobytes()).digest()


@dataclass
class Album:
    """Pictures by digest: what the HTTP side would have decoded."""

    pixels: dict[bytes, Pixels] = field(default_factory=dict)
    asked: list[tuple[str, bytes]] = field(default_factory=list)

    def span(self, start: int, length: int, pixels: Pixels) -> ImageSpan:
        digest = digest_of(pixels)
        self.pixels[digest] = pixels
        return ImageSpan(start, length, digest)


def make_prompt(model: Vlm, album: Album, parts: Sequence[int | Pixels], seed: int = 0) -> Prompt:
    """A prompt of random text runs (an int: so many tokens) and pictures, in the order given."""
    config = model.config
    rng = np.random.default_rng(seed)
    token_ids: list[int] = []
    spans = []
    for part in parts:
        if isinstance(part, int):
            text = rng.integers(5, config.decoder.vocab_size, part)
            token_ids += [int(token) + (int(token) == config.image_token_id) for token in text]
        else:
            spans.append(album.span(len(token_ids), config.num_image_tokens, part))
            token_ids += [config.image_token_id] * config.num_image_tokens
    return Prompt(tuple(min(token, config.decoder.vocab_size - 1) for token in token_ids), tuple(spans))


def make_request(name: str, prompt: Prompt, **params: Any) -> Request:
    salt, priority = params.pop("cache_salt", b""), params.pop("priority", 0)
    params = {"max_tokens": 8, "temperature": 0.0} | params
    return Request(id=name, prompt=prompt, sampling=SamplingParams(**params), cache_salt=salt, priority=priority)


@dataclass
class Answer:
    """All that one request got."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float | None] = field(default_factory=list)
    events: list[TokenEvent] = field(default_factory=list)
    finish: FinishEvent | None = None

    @property
    def reason(self) -> FinishReason:
        assert self.finish is not None, "the request has not ended"
        return self.finish.reason


def run_step(engine: Engine, album: Album, answers: Mapping[str, Answer]) -> None:
    """One step; its events are sorted into ``answers`` and its questions answered from ``album``."""
    for event in engine.step():
        match event:
            case PixelsWanted(request_id, digest):
                album.asked.append((request_id, digest))
                engine.provide(request_id, digest, album.pixels[digest])
            case TokenEvent():
                answer = answers[event.request_id]
                assert answer.finish is None, f"{event.request_id} got a token after its end"
                answer.events.append(event)
                answer.token_ids.append(event.token_id)
                answer.logprobs.append(event.logprob)
            case FinishEvent():
                assert answers[event.request_id].finish is None, f"{event.request_id} ended twice"
                answers[event.request_id].finish = event


def run(engine: Engine, requests: Iterable[Request], album: Album, *, max_steps: int = 5000) -> dict[str, Answer]:
    """Add all requests, step until the engine has nothing left to do, check the books."""
    answers = {}
    for request in requests:
        answers[request.id] = Answer()
        engine.add(request)
    for _ in range(max_steps):
        if not engine.has_work:
            break
        run_step(engine, album, answers)
    engine.check_integrity()
    unfinished = [name for name, answer in answers.items() if answer.finish is None]
    assert not unfinished, f"not finished after {max_steps} steps: {unfinished}"
    return answers


def requests_of(model: Vlm, album: Album, count: int, **params: Any) -> list[Request]:
    """Requests with none, one and three pictures, every other one sampled, of different lengths."""
    requests = []
    for i in range(count):
        parts: list[Any] = [3 + i]
        for j in range((0, 1, 3)[i % 3]):
            parts += [picture(model.config.vision.image_size, 100 * i + j), 1 + j]
        own: dict[str, Any] = {"max_tokens": 5 + 3 * (i % 5)}
        if i % 2:
            own |= {"temperature": 0.9, "seed": i, "top_p": 0.9}
        requests.append(make_request(f"r{i}", make_prompt(model, album, parts, seed=i), **(own | params)))
    return requests


def told(answers: Mapping[str, Answer]) -> dict[str, Any]:
    """All that the requests were told, but for what caches had."""
    return {
        name: (answer.token_ids, answer.reason, answer.finish and answer.finish.usage.completion_tokens)
        for name, answer in answers.items()
    }
