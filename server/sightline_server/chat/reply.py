"""What the choices say, in the wire's shapes: one ChatCompletion, or ChatChunks in the order that clients demand.

Knows the protocol's models and texts. Knows no HTTP and no framing.
"""

from collections.abc import AsyncGenerator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sightline_models.tokenizer import ChatTokenizer
from sightline_server.chat.deltas import TextDelta
from sightline_server.chat.generation import Generation
from sightline_server.engine.types import FinishReason, TokenEvent, Usage
from sightline_server.protocol.completion import (
    ChatChunk,
    ChatCompletion,
    Choice,
    ChoiceLogprobs,
    ChunkChoice,
    CompletionTokensDetails,
    CompletionUsage,
    Delta,
    PromptTokensDetails,
    ReplyMessage,
    TokenLogprob,
    TopLogprob,
    WireFinishReason,
)

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON lacks; the figure is OpenAI's."""
_LOGPROBS_PER_CHUNK = 168
"""Tokens with a log probability in one chunk, alternatives included: an event stays below the 64 KB clients read."""


@dataclass(frozen=True)
class ReplyHeader:
    """What every chunk of one reply repeats."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    names_tier: bool
    """Whether the request named a service tier, so that the reply says which one it was."""

    def fields(self) -> dict[str, Any]:
        tier = {"service_tier": "default"} if self.names_tier else {}
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
            **tier,
        }


async def collect(
    generation: Generation, header: ReplyHeader, tokenizer: ChatTokenizer, *, logprobs: bool
) -> ChatCompletion:
    """The whole reply. Raises the ApiError that ended a choice."""
    whole = [TextDelta("") for _ in range(generation.num_choices)]
    while arrived := await generation.arrivals():
        for index, delta in arrived.items():
            whole[index] = whole[index] + delta
    return ChatCompletion(
        **header.fields(),
        object="chat.completion",
        choices=[
            Choice(
                index=index,
                message=ReplyMessage(role="assistant", content=delta.text, refusal=None),
                logprobs=_choice_logprobs(delta.tokens, tokenizer) if logprobs else None,
                finish_reason=_finish(delta.finish),
            )
            for index, delta in enumerate(whole)
        ],
        usage=wire_usage(generation.usage()),
    )


async def stream(
    generation: Generation,
    header: ReplyHeader,
    tokenizer: ChatTokenizer,
    *,
    include_usage: bool,
    keep_alive_s: float | None,
) -> AsyncGenerator[ChatChunk | None, None]:
    """Roles first, in the order of the choices; texts as they come; one empty delta with each finish reason; usage.

    None stands for ``keep_alive_s`` of silence. Raises the ApiError that ended a choice.
    """
    common = {**header.fields(), "object": "chat.completion.chunk", **({"usage": None} if include_usage else {})}

    def chunk(
        index: int, delta: Delta, *, finish: WireFinishReason | None = None, logprobs: ChoiceLogprobs | None = None
    ) -> ChatChunk:
        choice = ChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish)
        return ChatChunk(**common, choices=[choice])

    for index in range(generation.num_choices):
        yield chunk(index, Delta(role="assistant", content=""))
    while True:
        try:
            arrived = await generation.arrivals(keep_alive_s)
        except TimeoutError:
            yield None
            continue
        if not arrived:
            break
        for index, delta in arrived.items():
            for text, tokens in _portions(delta):
                logprobs = _choice_logprobs(tokens, tokenizer) if tokens else None
                yield chunk(index, Delta(content=text), logprobs=logprobs)
            if delta.finish is not None:
                yield chunk(index, Delta(), finish=_finish(delta.finish))
    if include_usage:
        yield ChatChunk(**{**common, "choices": [], "usage": wire_usage(generation.usage())})


def wire_usage(usage: Usage) -> CompletionUsage:
    return CompletionUsage(
        prompt_tokens=usage.prompt_tokens,
        completion_tokens=usage.completion_tokens,
        total_tokens=usage.prompt_tokens + usage.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(
            cached_tokens=usage.cached_tokens,
            image_tokens=usage.image_tokens,
            text_tokens=usage.prompt_tokens - usage.image_tokens,
            audio_tokens=0,
        ),
        completion_tokens_details=CompletionTokensDetails(
            reasoning_tokens=0, audio_tokens=0, accepted_prediction_tokens=0, rejected_prediction_tokens=0
        ),
    )


def _portions(delta: TextDelta) -> Iterator[tuple[str, tuple[TokenEvent, ...]]]:
    """The delta in pieces that make events of a bounded size; the text goes with the first."""
    if not delta.text and not delta.tokens:
        return
    alternatives = max((len(event.top_logprobs) for event in delta.tokens), default=0)
    size = max(1, _LOGPROBS_PER_CHUNK // (1 + alternatives))
    yield delta.text, delta.tokens[:size]
    for start in range(size, len(delta.tokens), size):
        yield "", delta.tokens[start : start + size]


def _finish(reason: FinishReason | None) -> Literal["stop", "length"]:
    assert reason in (FinishReason.STOP, FinishReason.LENGTH), f"a choice ended with {reason}"
    return "stop" if reason is FinishReason.STOP else "length"


def _choice_logprobs(tokens: Sequence[TokenEvent], tokenizer: ChatTokenizer) -> ChoiceLogprobs:
    return ChoiceLogprobs(content=[_token_logprob(event, tokenizer) for event in tokens], refusal=None)


def _token_logprob(event: TokenEvent, tokenizer: ChatTokenizer) -> TokenLogprob:
    return TokenLogprob(
        **_described(event.token_id, event.logprob, tokenizer),
        top_logprobs=[TopLogprob(**_described(top.token_id, top.logprob, tokenizer)) for top in event.top_logprobs],
    )


def _described(token_id: int, logprob: float | None, tokenizer: ChatTokenizer) -> dict[str, Any]:
    assert logprob is not None, f"the engine sent token {token_id} without the log probability asked for"
    return {
        "token": tokenizer.token_text(token_id),
        "logprob": max(logprob, LEAST_LOGPROB),
        "bytes": list(tokenizer.token_bytes(token_id)),
    }
