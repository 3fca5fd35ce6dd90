"""A few pictures and questions, put to a model one after another through the paged path, with a clock beside it.

Pictures are drawn by seed, so that nothing has to be shipped. Knows a model, prompts and seconds. Knows nothing of
quantization, and judges nothing: ``verify.py`` does.
Suffixes: T packed tokens, D decoder width, P positions of an answer, V vocabulary.
"""

import random
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from sightline_models.config import VlmConfig, read_generation_defaults
from sightline_models.demo.fonts import AILERON
from sightline_models.demo.scenes import PLAIN, draw
from sightline_models.images import Pixels, prepare, read_preprocess_config
from sightline_models.kv import KvPool
from sightline_models.tokenizer import ChatTokenizer, ImagePart, Message, TextPart
from sightline_models.vlm import Vlm
from sightline_server.confined.template_renderer import TemplateRenderer
from sightline_server.engine.batch import build_batch
from sightline_server.engine.transfer import to_device
from sightline_server.engine.types import (
    EngineConfig,
    ImageSpan,
    Pace,
    Prompt,
    Request,
    SamplingParams,
    Sequence,
    Slice,
)

ANSWER_TOKENS = 32
"""Of each answer, at most; decoding is timed over as many."""
_SEED = 20261121

QUESTIONS = (
    ("shapes", "Describe the picture."),
    ("shapes", "How many things are there?"),
    ("shapes", "List everything in the picture with its colour."),
    ("shapes", "What is in the middle, and what is left of it?"),
    ("number", "What number is written here?"),
    ("word", "What word is written here?"),
    ("receipt", "Read the receipt."),
    ("receipt", "What is the total, and what did the first item cost?"),
)
"""What to draw, and what to ask about it."""


@dataclass(frozen=True)
class Case:
    """One picture with its question."""

    prompt: Prompt
    pixels: Pixels


@dataclass(frozen=True)
class Answered:
    """What a model made of the cases, kept on the host."""

    answers: tuple[tuple[int, ...], ...]
    """Its own greedy answers, an end token among their tokens."""
    logits_PV: tuple[Tensor, ...]
    """For each case, float32 and on the host: at every position of the answer that was scored."""
    pace: Pace


def draw_cases(folder: Path, config: VlmConfig, *, chat_template: str | None, longest: int) -> tuple[Case, ...]:
    """The cases as the checkpoint in ``folder`` takes them, those left out that don't fit ``longest`` tokens.

    Raises CheckpointError, TokenizerError or ImageError for files that can't be used.
    """
    tokenizer = ChatTokenizer.load(folder, config, chat_template=chat_template, make_template=TemplateRenderer)
    preprocess = read_preprocess_config(folder, config)
    # The one typeface that needs no package beside Pillow.
    look = replace(PLAIN, fonts=(AILERON,))
    rng = random.Random(_SEED)
    cases = []
    for kind, question in QUESTIONS:
        picture = prepare(draw(rng, look, kind)[0], preprocess)
        message = Message("user", (ImagePart(), TextPart(question)))
        encoded = tokenizer.encode_chat([message], [picture.num_tokens])
        span = ImageSpan(encoded.image_starts[0], picture.num_tokens, picture.digest)
        if len(encoded.token_ids) + ANSWER_TOKENS <= longest:
            cases.append(Case(Prompt(encoded.token_ids, (span,)), picture.pixels))
    return tuple(cases)


def end_tokens(folder: Path, config: VlmConfig) -> frozenset[int]:
    return frozenset(read_generation_defaults(folder, config).eos_token_ids)


def answer(
    model: Vlm,
    cases: Seq[Case],
    limits: EngineConfig,
    device: torch.device,
    *,
    end: frozenset[int],
    scored: Seq[Seq[int]] | None = None,
) -> Answered:
    """Put every case to ``model``: time its prompt and a greedy answer, then score an answer in one forward pass.

    ``scored`` are the answers to score, its own where there are none given.
    """
    path, threads = _Path(model, cases, limits, device), torch.get_num_threads()
    try:
        with torch.inference_mode():
            # The first time, kernels are compiled and libraries set themselves up.
            path.decode(cases[0])
            path.prompt_speeds.clear()
            path.decode_speeds.clear()
            answers = [_until_end(path.decode(case), end) for case in cases]
            wanted = answers if scored is None else scored
            logits_PV = tuple(path.score(case, tokens) for case, tokens in zip(cases, wanted, strict=True))
    finally:
        torch.set_num_threads(threads)
    pace = Pace(
        weight_bytes=model.num_bytes,
        prompt_tokens_per_s=median(path.prompt_speeds),
        decode_tokens_per_s=median(path.decode_speeds),
    )
    return Answered(tuple(answers), logits_PV, pace)


def _until_end(tokens: Seq[int], end: frozenset[int]) -> tuple[int, ...]:
    """``tokens`` up to the first end token, that one too: what would come after it is never shown."""
    last = next((place for place, token in enumerate(tokens) if token in end), len(tokens) - 1)
    return tuple(tokens[: last + 1])


class _Path:
    """The paged path for one sequence at a time, in a cache as long as the longest case; tokens/s of each case."""

    def __init__(self, model: Vlm, cases: Seq[Case], limits: EngineConfig, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._block_size = limits.block_size
        self._chunk = limits.max_step_tokens
        self._threads = torch.get_num_threads()
        longest = max(len(case.prompt.token_ids) for case in cases) + ANSWER_TOKENS
        self._num_blocks = -(-longest // limits.block_size)
        weight = model.decoder.embed_tokens.weight
        self._kv = KvPool.allocate(
            model.config.decoder,
            num_blocks=self._num_blocks + 1,
            block_size=limits.block_size,
            dtype=weight.dtype,
            device=device,
            heads_apart=model.decoder.heads_apart,
        )
        self.prompt_speeds: list[float] = []
        self.decode_speeds: list[float] = []

    def decode(self, case: Case) -> list[int]:
        """Greedy tokens, however early an end token is among them, so that all models are timed over as many."""
        began = self._now()
        sequence, picture_ID = self._begin(case, ())
        hidden_TD = self._pass(sequence, picture_ID, 0)
        tokens = [self._likeliest(hidden_TD[-1:])]
        read = self._now()
        while len(tokens) < ANSWER_TOKENS:
            sequence.token_ids.append(tokens[-1])
            hidden_TD = self._pass(sequence, picture_ID, len(sequence.token_ids) - 1)
            tokens.append(self._likeliest(hidden_TD))
        self.prompt_speeds.append(len(case.prompt.token_ids) / (read - began))
        self.decode_speeds.append((ANSWER_TOKENS - 1) / (self._now() - read))
        return tokens

    def score(self, case: Case, answer: Seq[int]) -> Tensor:
        """Return logits_PV on the host: what the model thinks at each position of ``answer``."""
        sequence, picture_ID = self._begin(case, answer)
        hidden_TD = self._pass(sequence, picture_ID, 0)
        # The row before a token is the one that it is chosen from.
        first = len(case.prompt.token_ids) - 1
        return self._model.logits(hidden_TD[first : first + len(answer)]).float().cpu()

    def _begin(self, case: Case, answer: Seq[int]) -> tuple[Sequence, Tensor]:
        request = Request(id="verify", prompt=case.prompt, sampling=SamplingParams(max_tokens=ANSWER_TOKENS))
        blocks = list(range(self._num_blocks))
        sequence = Sequence(request, [*case.prompt.token_ids, *answer], blocks=blocks)
        pixels_1YXC = to_device(torch.from_numpy(case.pixels[None].copy()), self._device)
        self._use_threads(len(case.prompt.token_ids))
        return sequence, self._model.encode_images(pixels_1YXC)[0]

    def _pass(self, sequence: Sequence, picture_ID: Tensor, start: int) -> Tensor:
        """Compute the tokens from ``start`` on, a step's budget at a time; return their hidden_TD."""
        end, rows_TD = len(sequence.token_ids), []
        self._use_threads(end - start)
        for first in range(start, end, self._chunk):
            batch = build_batch(
                [Slice(sequence, first, min(self._chunk, end - first))],
                block_size=self._block_size,
                scratch_block=self._num_blocks,
                device=self._device,
            )
            hidden_TD = self._model.embed(batch.token_ids_T)
            for part in batch.images:
                hidden_TD[part.row : part.row + part.length] = picture_ID[part.offset : part.offset + part.length]
            rows_TD.append(self._model(hidden_TD, batch.positions_T, self._kv, batch.layout))
        return torch.cat(rows_TD)

    def _likeliest(self, hidden_1D: Tensor) -> int:
        return int(self._model.logits(hidden_1D).argmax(dim=-1).item())

    def _use_threads(self, rows: int) -> None:
        """A prompt gets all, a token one: which is faster, the engine finds out in longer use."""
        if self._device.type == "cpu":
            torch.set_num_threads(1 if rows == 1 else self._threads)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
