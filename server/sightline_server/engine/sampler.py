"""From logits and sequences to one token each: bias, penalties, filters, draw, log-probabilities.

Knows what each request asked for. Knows nothing of text, stop conditions or the cache.

Shape suffixes: S sampled rows, V vocabulary.
"""

from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch
from torch import Tensor

from sightline_kernels.sample.reference import filter_logits, sample
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
            ids = torch.tensor(list(params.logit_bias), device=row_V.device)
            row_V[ids] += torch.tensor(list(params.logit_bias.values()), device=row_V.device)
        if banned:
            row_V[torch.tensor(banned, device=row_V.device)] = -torch.inf
    return shaped_SV


def _penalize(row_V: Tensor, sequence: Sequence) -> None:
    """Repetition penalty over prompt and answer (Keskar et al., 2019); presence and frequency over the answer."""
    params = sequence.request.sampling
    all_ids = torch.tensor(sequence.token_ids, device=row_V.device)
    if params.repetition_penalty != 1.0:
        seen = torch.unique(all_ids)
        values = row_V[seen]
        penalty = params.repetition_penalty
        row_V[seen] = torch.where(values > 0, values / penalty, values * penalty)
    if params.presence_penalty or params.frequency_penalty:
        count_V = torch.bincount(all_ids[sequence.num_prompt_tokens :], minlength=row_V.shape[0])
        row_V -= params.frequency_penalty * count_V + params.presence_penalty * (count_V > 0)


def _draw(logits_SV: Tensor, sequences: Seq[Sequence]) -> Tensor:
    all_params = [sequence.request.sampling for sequence in sequences]
    temperatures = [params.temperature if params.temperature >= LEAST_TEMPERATURE else 0.0 for params in all_params]
    if not any(temperatures):
        return logits_SV.argmax(dim=-1)
    device = logits_SV.device
    temperature_S = torch.tensor(temperatures, device=device)
    logits_SV = logits_SV / torch.where(temperature_S == 0, 1.0, temperature_S)[:, None]
    if any(params.top_k or params.top_p < 1 or params.min_p for params in all_params):
        logits_SV = filter_logits(
            logits_SV,
            torch.tensor([params.top_k for params in all_params], device=device),
            torch.tensor([params.top_p for params in all_params], device=device),
            torch.tensor([params.min_p for params in all_params], device=device),
        )
    return sample(
        logits_SV,
        temperature_S,
        # The same 64 bits, as torch's signed integers hold them.
        torch.tensor([params.seed - (params.seed >> 63 << 64) for params in all_params], device=device),
        torch.tensor([params.choice for params in all_params], device=device),
        torch.tensor([sequence.num_generated for sequence in sequences], device=device),
    )


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
