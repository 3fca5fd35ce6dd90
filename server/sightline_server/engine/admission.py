"""Why a request can't run, before anything is computed for it.

The HTTP side has refused all of this by name already. What slipped through would not end a request but the device: an
index beyond the vocabulary stops a GPU for good. Knows numbers and bounds. Knows no queue and no cache.
"""

import math

from sightline_server.engine.types import Request, SamplingParams

MOST_TOP_LOGPROBS = 20
"""As the API has it."""


def refusal(request: Request, *, max_model_len: int, vocab_size: int) -> tuple[str, str] | None:
    """An error code and a sentence, or None when the request can run."""
    length = len(request.prompt.token_ids)
    if length == 0:
        return "invalid_value", "The prompt is empty. Send at least one message."
    if length >= max_model_len:
        return "context_length_exceeded", (
            f"This model's maximum context length is {max_model_len} tokens. However, the prompt has {length} tokens "
            "and needs room for an answer. Shorten the messages or send fewer images."
        )
    if min(request.prompt.token_ids) < 0 or max(request.prompt.token_ids) >= vocab_size:
        return "invalid_value", f"The prompt holds a token id outside of 0 to {vocab_size - 1}. Send ids of this model."
    end = 0
    for span in request.prompt.images:
        if span.start < end or span.length < 1 or span.start + span.length > length:
            return "invalid_value", "The prompt's pictures overlap or lie outside of it. Send them in their order."
        end = span.start + span.length
    wrong = _wrong_field(request.sampling, vocab_size)
    if wrong is not None:
        name, bounds = wrong
        return "invalid_value", f"'{name}' is out of bounds. Send {bounds}."
    return None


def _wrong_field(params: SamplingParams, vocab_size: int) -> tuple[str, str] | None:
    """The first field that a step couldn't compute with, and what it may hold."""
    penalties = (params.presence_penalty, params.frequency_penalty)
    ids = f"ids from 0 to {vocab_size - 1}"
    # A comparison with a NaN is false: bounds are asked for, not what lies outside of them.
    within = (
        ("max_tokens", "1 or more", params.max_tokens >= 1),
        ("min_tokens", "0 or more", params.min_tokens >= 0),
        ("temperature", "a finite number, 0 or more", 0 <= params.temperature < math.inf),
        ("top_p", "a number from 0 to 1", 0 <= params.top_p <= 1),
        ("top_k", "0 or more", 0 <= params.top_k < 2**63),
        ("min_p", "a number from 0 to 1", 0 <= params.min_p <= 1),
        ("presence_penalty or frequency_penalty", "finite numbers", all(map(math.isfinite, penalties))),
        ("repetition_penalty", "a finite number above 0", 0 < params.repetition_penalty < math.inf),
        ("seed", "an unsigned 64-bit integer", 0 <= params.seed < 2**64),
        ("choice", "an unsigned 32-bit integer", 0 <= params.choice < 2**32),
        ("top_logprobs", f"0 to {MOST_TOP_LOGPROBS}", 0 <= params.top_logprobs <= MOST_TOP_LOGPROBS),
        ("logit_bias", ids, all(0 <= token_id < vocab_size for token_id in params.logit_bias)),
        ("logit_bias", "finite numbers", all(map(math.isfinite, params.logit_bias.values()))),
        # They are written to only while ``min_tokens`` holds them off.
        ("stop_token_ids", ids, not params.min_tokens or all(0 <= each < vocab_size for each in params.stop_token_ids)),
    )
    return next(((name, bounds) for name, bounds, holds in within if not holds), None)
