"""From logits and sequences to one token each: bias, penalties, filters, draw, log-probabilities.

Knows what each request asked for. Knows nothing of text, stop conditions or the cache.

Shape suffixes: S sampled rows, V vocabulary, K likeliest tokens.
"""

import math
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from sightline_kernels.dispatch import Sample
from sightline_server.engine.transfer import to_device
from sightline_server.engine.types import Sequence, TopLogprob

LEAST_TEMPERATURE = 1e-6
"""Below it the draw is the likeliest token: divided by less, large logits overflow float32 and are all the same."""


@dataclass(frozen=True)
class Sampled:
    """The token chosen for one sequence."""

    token_id: int
    logprob: float | None = None
    top_logprobs: tuple[TopLogprob, ...] = ()
    is_sound: bool = True
    """False where the row's logits hold a NaN or an infinity, or allow no token: then the token means nothing."""


@dataclass(frozen=True)
class Drawn:
    """One token for each of some sequences, still on the device."""

    sequences: tuple[Sequence, ...]
    token_ids_S: Tensor
    largest_S: Tensor
    """Of each row's logits, as drawn from: a NaN if any of them is one, infinite if none may be chosen or one is."""
    logprobs: tuple[Tensor, Tensor, Tensor] | None = None
    """Of the drawn tokens [S], of the likeliest ones and their ids, both [S, K]; where a sequence asks for any."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What the host has to see for ``read``."""
        return (self.token_ids_S, self.largest_S, *(self.logprobs or ()))

    def read(self, tensors: Seq[Tensor]) -> list[Sampled]:
        """The tokens, from ``tensors`` on the host."""
        token_ids: list[int] = tensors[0].tolist()
        sound = [math.isfinite(largest) for largest in tensors[1].tolist()]
        if self.logprobs is None:
            return [Sampled(token_id, is_sound=each) for token_id, each in zip(token_ids, sound, strict=True)]
        chosen, best_values, best_ids = (tensor.tolist() for tensor in tensors[2:])
        results = []
        for row, sequence in enumerate(self.sequences):
            params = sequence.request.sampling
            if not (params.logprobs and sound[row]):
                results.append(Sampled(token_ids[row], is_sound=sound[row]))
                continue
            best = zip(best_ids[row][: params.top_logprobs], best_values[row][: params.top_logprobs], strict=True)
            tops = tuple(TopLogprob(token_id, value) for token_id, value in best)
            results.append(Sampled(token_ids[row], chosen[row], tops))
        return results


@dataclass(frozen=True)
class DrawNumbers:
    """What a draw takes beside logits, a number a row, on the host."""

    floats_3S: np.ndarray[tuple[int, int], np.dtype[np.float32]]
    """Temperature (0: greedy), top-p, min-p."""
    integers_4S: np.ndarray[tuple[int, int], np.dtype[np.int64]]
    """Top-k, seed (its 64 bits), choice, position."""

    @property
    def is_greedy(self) -> bool:
        return not self.floats_3S[0].any()

    @property
    def temperature_S(self) -> Tensor:
        return torch.from_numpy(self.floats_3S[0])

    @property
    def counters(self) -> tuple[Tensor, Tensor, Tensor]:
        """Seed, choice and position, which noise is a function of, each [S]."""
        _, seed_S, choice_S, position_S = torch.from_numpy(self.integers_4S).unbind()
        return seed_S, choice_S, position_S

    @property
    def has_filter(self) -> bool:
        _, top_p_S, min_p_S = self.floats_3S
        return bool(self.integers_4S[0].any() or (top_p_S < 1).any() or min_p_S.any())


def draw_numbers(sequences: Seq[Sequence]) -> DrawNumbers:
    """The numbers that the next token of each of ``sequences`` is drawn by."""
    floats, integers = [], []
    for sequence in sequences:
        params = sequence.request.sampling
        temperature = params.temperature if params.temperature >= LEAST_TEMPERATURE else 0.0
        floats.append((temperature, params.top_p, params.min_p))
        # A seed's 64 bits, as a signed integer holds them.
        integers.append((params.top_k, params.seed - (params.seed >> 63 << 64), params.choice, sequence.num_drawn))
    return DrawNumbers(
        np.ascontiguousarray(np.array(floats, np.float32).T), np.ascontiguousarray(np.array(integers, np.int64).T)
    )


def is_plain(sequence: Sequence) -> bool:
    """Whether its next token takes nothing but logits and ``DrawNumbers``: no shaping, no log-probabilities."""
    params = sequence.request.sampling
    return not (params.logprobs or params.logit_bias or sequence.draws_by_history or _banned(sequence))


def choose_tokens(logits_SV: Tensor, sequences: Seq[Sequence], draw: Sample) -> Drawn:
    """One token for each row, in order: a function of the row's logits and its sequence alone.

    Args:
        logits_SV: float32, one row a sequence. Not modified.
        draw: the kernel ``sample``, or its twin.
    """
    shaped_SV = _shape(logits_SV, sequences)
    token_ids_S = _draw(shaped_SV, draw_numbers(sequences), draw)
    logprobs = None
    if any(sequence.request.sampling.logprobs for sequence in sequences):
        logprobs = _logprobs(logits_SV, sequences, token_ids_S)
    # One more pass over the rows, on the device: that a row is sound is learned with its token.
    return Drawn(tuple(sequences), token_ids_S, shaped_SV.amax(dim=-1), logprobs)


def _banned(sequence: Sequence) -> tuple[int, ...]:
    params = sequence.request.sampling
    return params.stop_token_ids if sequence.num_drawn < params.min_tokens else ()


def _shape(logits_SV: Tensor, sequences: Seq[Sequence]) -> Tensor:
    """Bias, penalties and forbidden stop tokens, on the rows that ask for any."""
    shaped_SV = logits_SV
    for row, sequence in enumerate(sequences):
        params, banned = sequence.request.sampling, _banned(sequence)
        if not (params.logit_bias or sequence.draws_by_history or banned):
            continue
        if shaped_SV is logits_SV:
            shaped_SV = logits_SV.clone()
        row_V = shaped_SV[row]
        if sequence.draws_by_history:
            _penalize(row_V, sequence)
        if params.logit_bias:
            ids = to_device(torch.tensor(list(params.logit_bias)), row_V.device)
            biases = torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)
            row_V.index_add_(0, ids, to_device(biases, row_V.device))
        if banned:
            row_V.index_fill_(0, to_device(torch.tensor(banned), row_V.device), -torch.inf)
    return shaped_SV


def _penalize(row_V: Tensor, sequence: Sequence) -> None:
    """Repetition penalty over prompt and answer (Keskar et al., 2019); presence and frequency over the answer."""
    assert sequence.num_pending == 0, f"request {sequence.id} is penalized for tokens of which some aren't known"
    params = sequence.request.sampling
    all_ids = to_device(torch.tensor(sequence.token_ids), row_V.device)
    if params.repetition_penalty != 1.0:
        # A token seen twice is written twice, the same both times. Finding the distinct ones, a device would be
        # waited for, as it would for a count by ``bincount``.
        values = row_V[all_ids]
        penalty = params.repetition_penalty
        row_V[all_ids] = torch.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty or params.frequency_penalty:
        answer_ids = all_ids[sequence.num_prompt_tokens :]
        count_V = torch.zeros_like(row_V).index_add_(0, answer_ids, torch.ones_like(answer_ids, dtype=row_V.dtype))
        row_V -= params.frequency_penalty * count_V + params.presence_penalty * (count_V > 0)


def _draw(logits_SV: Tensor, numbers: DrawNumbers, draw: Sample) -> Tensor:
    if numbers.is_greedy:
        return logits_SV.argmax(dim=-1)
    temperature_S, top_p_S, min_p_S = to_device(torch.from_numpy(numbers.floats_3S), logits_SV.device).unbind()
    top_k_S, seed_S, choice_S, position_S = to_device(torch.from_numpy(numbers.integers_4S), logits_SV.device).unbind()
    return draw(
        logits_SV,
        temperature_S,
        top_k_S,
        top_p_S,
        min_p_S,
        seed_S,
        choice_S,
        position_S,
        filtered=numbers.has_filter,
    )


def _logprobs(logits_SV: Tensor, sequences: Seq[Sequence], token_ids_S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    logprobs_SV = logits_SV.log_softmax(dim=-1)
    chosen_S = logprobs_SV.gather(1, token_ids_S[:, None])[:, 0]
    widest = max(sequence.request.sampling.top_logprobs for sequence in sequences)
    best = logprobs_SV.topk(min(widest, logprobs_SV.shape[1]), dim=-1)
    return chosen_S, best.values, best.indices
