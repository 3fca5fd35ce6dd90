"""What ``/v1/chat/completions`` answers: whole, or in chunks.

Serialise with ``exclude_unset``: what was set stays, null included, since clients demand some nulls and choke on
others.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Wire(BaseModel):
    model_config = ConfigDict(frozen=True)


class TopLogprob(_Wire):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    """One token. ``bytes`` are its true bytes, which may be a part of a character."""

    top_logprobs: list[TopLogprob]


class ChoiceLogprobs(_Wire):
    content: list[TokenLogprob] | None
    refusal: list[TokenLogprob] | None


class PromptTokensDetails(_Wire):
    cached_tokens: int
    image_tokens: int
    text_tokens: int
    audio_tokens: int


class CompletionTokensDetails(_Wire):
    reasoning_tokens: int
    audio_tokens: int
    accepted_prediction_tokens: int
    rejected_prediction_tokens: int


class CompletionUsage(_Wire):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


WireFinishReason = Literal["stop", "length"]


class ReplyMessage(_Wire):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None


class Choice(_Wire):
    index: int
    message: ReplyMessage
    logprobs: ChoiceLogprobs | None
    finish_reason: WireFinishReason


class ChatCompletion(_Wire):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: CompletionUsage
    system_fingerprint: str
    service_tier: Literal["default"] | None = None
    """Present when the request named a tier."""


class Delta(_Wire):
    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(_Wire):
    index: int
    delta: Delta
    logprobs: ChoiceLogprobs | None
    finish_reason: WireFinishReason | None


class ChatChunk(_Wire):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChunkChoice]
    system_fingerprint: str
    service_tier: Literal["default"] | None = None
    usage: CompletionUsage | None = None
    """Absent unless ``stream_options.include_usage``; then null in every chunk but the last."""
