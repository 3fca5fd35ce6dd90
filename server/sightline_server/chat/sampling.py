"""How tokens are chosen for a request: its own fields, else the checkpoint's defaults, every one made definite.

Knows the fields of a chat request and the engine's. Knows no text and no tokenizer.
"""

import secrets
from dataclasses import replace

import msgspec

from sightline_models.config import GenerationDefaults
from sightline_server.chat.model import ServedModel
from sightline_server.engine.types import SamplingParams
from sightline_server.errors import InvalidRequest
from sightline_server.protocol.chat import ChatRequest

_MAX_TOKEN_DIGITS = 10


def resolve_sampling(
    request: ChatRequest, model: ServedModel, *, prompt_tokens: int, context_length: int
) -> SamplingParams:
    """The parameters of choice 0. Raises InvalidRequest for what doesn't fit the model."""
    defaults = _requested_over(request, model.generation)
    vocab_size = model.config.decoder.vocab_size
    limit = _token_limit(request, prompt_tokens, context_length)
    min_tokens = request.min_tokens or 0
    if min_tokens > limit:
        raise InvalidRequest(
            f"'min_tokens' ({min_tokens}) is greater than the {limit} tokens that fit behind this prompt.",
            param="min_tokens",
        )
    stops = _stop_token_ids(request.stop_token_ids or [], vocab_size)
    return SamplingParams(
        max_tokens=limit,
        min_tokens=min_tokens,
        # Nucleus sampling from no mass at all is its limit, the likeliest token.
        temperature=0.0 if defaults.top_p == 0 else defaults.temperature,
        top_p=defaults.top_p or 1.0,
        top_k=min(defaults.top_k, vocab_size),
        min_p=request.min_p or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=defaults.repetition_penalty,
        logit_bias=_logit_bias(request.logit_bias or {}, vocab_size),
        seed=secrets.randbits(64) if request.seed is None else request.seed % 2**64,
        stop_token_ids=stops if request.ignore_eos else tuple(dict.fromkeys(model.generation.eos_token_ids + stops)),
        logprobs=bool(request.logprobs),
        top_logprobs=request.top_logprobs or 0,
    )


def for_choice(sampling: SamplingParams, choice: int) -> SamplingParams:
    return msgspec.structs.replace(sampling, choice=choice)


def _requested_over(request: ChatRequest, defaults: GenerationDefaults) -> GenerationDefaults:
    given = {
        name: getattr(request, name)
        for name in ("temperature", "top_p", "top_k", "repetition_penalty")
        if getattr(request, name) is not None
    }
    if "top_k" in given:
        given["top_k"] = max(0, given["top_k"])
    return replace(defaults, **given)


def _token_limit(request: ChatRequest, prompt_tokens: int, context_length: int) -> int:
    limit = f"This model's maximum context length is {context_length} tokens. However, "
    if prompt_tokens > context_length:
        raise InvalidRequest(
            f"{limit}your messages resulted in {prompt_tokens} tokens. Please reduce the length of the messages.",
            code="context_length_exceeded",
            param="messages",
        )
    wanted = request.requested_tokens
    if prompt_tokens + (wanted or 1) > context_length:
        raise InvalidRequest(
            f"{limit}you requested {prompt_tokens + (wanted or 1)} tokens ({prompt_tokens} in the messages, "
            f"{wanted or 1} in the completion). Please reduce the length of the messages or completion.",
            code="context_length_exceeded",
            param="messages" if wanted is None else request.requested_tokens_field,
        )
    return context_length - prompt_tokens if wanted is None else wanted


def _logit_bias(bias: dict[str, float], vocab_size: int) -> dict[int, float]:
    made = {}
    for name, value in bias.items():
        if not (name.isascii() and name.isdigit() and len(name) <= _MAX_TOKEN_DIGITS and int(name) < vocab_size):
            raise InvalidRequest(
                f"Invalid 'logit_bias': {name[:20]!r} is no token id of this model (0 to {vocab_size - 1}).",
                param="logit_bias",
            )
        made[int(name)] = value
    return made


def _stop_token_ids(ids: list[int], vocab_size: int) -> tuple[int, ...]:
    for index, token_id in enumerate(ids):
        if not 0 <= token_id < vocab_size:
            param = f"stop_token_ids[{index}]"
            raise InvalidRequest(f"Invalid {param!r}: token ids go from 0 to {vocab_size - 1}.", param=param)
    return tuple(ids)
