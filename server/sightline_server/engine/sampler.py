"""From logits and sequences to one token each: bias, penalties, filters, draw, log-probabilities.

Knows what each request asked for. Knows nothing of text, stop conditions or the cache.

Shape suffixes: S sampled rows, V vocabulary.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from sightline_kernels.sample.reference import sample
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


def choose_tokens(logits_SV: Tensor, sequences: Seq[Sequence]) -> list[Sampled]:
    """One token for each row, in order: a function of the row's logits and its sequence alone.

    Args:
        logits_SV: float32, one row a sequence. Not modified.
    """
    token_ids = _draw(_shape(logits_SV, sequences), sequences).tolist()
    if not any(sequence.request.sampling.logprobs for sequence in sequences):
        return [Sampled(token_id) for token_id in token_ids]
    return _with_logprobs(logits_SV, sequences, token_ids)


def _shape(logits_SV: Tensor, sequences: Seq[Sequence]) -> Tensor:
    """Bias, penalties and forbidden stop tokens, on the rows that ask for any."""
    shaped_SV = logits_SV
    for row, sequence in enumerate(sequences):
        params = sequence.request.sampling
        banned = params.stop_token_ids if sequence.num_generated < params.min_tokens else ()
        penalized = params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty
        if not (params.logit_bias or penalized or banned):
            continue
        if shaped_SV is logits_SV:
            shaped_SV = logits_SV.clone()
        row_V = shaped_SV[row]
        if penalized:
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


def _draw(logits_SV: Tensor, sequences: Seq[Sequence]) -> Tensor:
    all_params = [sequence.request.sampling for sequence in sequences]
    temperatures = [params.temperature if params.temperature >= LEAST_TEMPERATURE else 0.0 for params in all_params]
    if not any(temperatures):
        return logits_SV.argmax(dim=-1)
    numbers = [temperatures, [params.top_p for params in all_params], [params.min_p for params in all_params]]
    temperature_S, top_p_S, min_p_S = to_device(torch.tensor(numbers, dtype=torch.float32), logits_SV.device).unbind()
    integers = [
        [params.top_k for params in all_params],
        # The same 64 bits, as torch's signed integers hold them.
        [params.seed - (params.seed >> 63 << 64) for params in all_params],
        [params.choice for params in all_params],
        [sequence.num_generated for sequence in sequences],
    ]
    top_k_S, seed_S, choice_S, position_S = to_device(torch.tensor(integers), logits_SV.device).unbind()
    filtered = any(params.top_k or params.top_p < 1 or params.min_p for params in all_params)
    filters = (top_k_S, top_p_S, min_p_S)
    return sample(logits_SV, temperature_S, *filters, seed_S, choice_S, position_S, filtered=filtered)


def _with_logprobs(logits_SV: Tensor, sequences: Seq[Sequence], token_ids: list[int]) -> list[Sampled]:
    logprobs_SV = logits_SV.log_softmax(dim=-1)
    chosen = logprobs_SV.gather(1, torch.tensor(token_ids, device=logits_SV.device)[:, None])[:, 0].tolist()
    widest = max(sequence.request.sampling.top_logprobs for sequence in sequences)
    best = logprobs_SV.topk(min(widest, logprobs_SV.shape[1]), dim=-1)
    best_values, best_ids = best.values.tolist(), best.indices.tolist()
    results = []
    for row, sequence in enumerate(sequences):
        params = sequence.request.sampling
        if not params.logprobs:
            results.append(Sampled(token_ids[row]))
            continue
        tops = zip(best_ids[row][: params.top_logprobs], best_values[row][: params.top_logprobs], strict=True)
        results.append(Sampled(token_ids[row], chosen[row], tuple(TopLogprob(i, value) for i, value in tops)))
    return results
