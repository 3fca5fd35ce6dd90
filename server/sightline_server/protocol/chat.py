"""The body of ``POST /v1/chat/completions``: every field of it is honoured, accepted because it cannot change the
answer, or refused by name.

Knows the wire's names, types and ranges. Knows no model: what depends on one is checked where the model is known.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from sightline_server.errors import InvalidRequest
from sightline_server.protocol.validation import unrecognized, validate

MAX_STOP_STRINGS = 4
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_LOGIT_BIAS = 1024
MAX_METADATA = 16
MAX_MESSAGES = 16384
"""In one request, and parts in one message; a context holds far fewer."""
INT64 = 2**63

ACCEPTED_WITHOUT_EFFECT: Mapping[str, str] = MappingProxyType(
    {
        "user": "names the end user; nothing is kept by user",
        "safety_identifier": "names the end user; nothing is kept by user",
        "metadata": "labels for stored completions; checked (16 pairs, 64 and 512 characters), then dropped",
        "store": "false or null only: completions are never stored",
        "service_tier": "there is one tier; the answer says 'default'",
        "prompt_cache_key": "caching needs no hint",
        "prompt_cache_options": "caching needs no hint",
        "prompt_cache_retention": "caching needs no hint",
        "prediction": "a hint for speed only",
        "modalities": "['text'] or null only",
        "audio": "describes spoken output, which 'modalities' cannot ask for here",
        "parallel_tool_calls": "there are no tool calls to run in parallel",
        "reasoning_effort": "the served models have one way of answering",
        "reasoning": "the same, as some clients spell it",
        "verbosity": "the served models have one way of answering",
    }
)
"""Fields of ChatRequest that are checked and then have no effect, with the reason; the docs list them."""

NOT_BUILT: Mapping[str, str] = MappingProxyType(
    {
        "web_search_options": "This server never searches the web: leave 'web_search_options' out.",
        "moderation": "Moderation is not available on this server: leave 'moderation' out.",
    }
)
"""Known fields that would change the answer: null is accepted, anything else refused."""

NEVER: tuple[str, ...] = ("mm_processor_kwargs", "media_io_kwargs", "prompt_embeds", "cache_salt", "logits_processors")
"""Fields of other servers that reach into the server itself; refused whatever their value, as is ``chat_template*``."""


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")


class _Open(BaseModel):
    """Unknown keys inside messages and parts are accepted: clients put their own there."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class TextContent(_Open):
    type: Literal["text"]
    text: str


class RefusalContent(_Open):
    """An earlier refusal of the assistant's, handed back as history."""

    type: Literal["refusal"]
    refusal: str


class ImageUrl(_Open):
    url: str
    detail: Literal["auto", "low", "high", "original"] | None = None
    """Accepted; the served models see every picture at one fixed size."""


def _string_or(tag: str, kind: type) -> Any:
    def choose(value: Any) -> str | None:
        if isinstance(value, str):
            return "string"
        return tag if isinstance(value, kind | BaseModel) else None

    return choose


class ImageContent(_Open):
    type: Literal["image_url"]
    image_url: Annotated[
        Annotated[str, Tag("string")] | Annotated[ImageUrl, Tag("object")],
        Discriminator(
            _string_or("object", dict),
            custom_error_type="image_url_type",
            custom_error_message="Input should be an object with 'url', or a URL as a string",
        ),
    ]

    @property
    def url(self) -> str:
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


ContentPart = Annotated[TextContent | ImageContent | RefusalContent, Field(discriminator="type")]
_Parts = Annotated[list[ContentPart], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
Content = Annotated[
    Annotated[str, Tag("string")] | Annotated[_Parts, Tag("parts")],
    Discriminator(
        _string_or("parts", list),
        custom_error_type="content_type",
        custom_error_message="Input should be a string or a list of parts",
    ),
]


class ChatMessage(_Open):
    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: Content | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None


class StreamOptions(_Strict):
    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Accepted; nothing is padded, as nothing here crosses a network it must hide from."""


class ResponseFormat(_Open):
    type: Literal["text", "json_object", "json_schema"]


def _at_most(most: int) -> Any:
    """pydantic looks at every entry of an object before it counts them."""

    def check(value: Any) -> Any:
        if isinstance(value, dict) and len(value) > most:
            raise PydanticCustomError("too_long", f"Input should have at most {most} entries, not {len(value)}")
        return value

    return BeforeValidator(check)


_MetadataKey = Annotated[str, Field(max_length=64)]
_MetadataValue = Annotated[str, Field(max_length=512)]
_Penalty = Annotated[float, Field(ge=-2, le=2)]
_StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


class ChatRequest(_Strict):
    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]

    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    max_tokens: Annotated[int, Field(ge=1, lt=INT64)] | None = None
    min_tokens: Annotated[int, Field(ge=0, lt=INT64)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=INT64)] | None = None
    """-1 and 0 mean no limit."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: _Penalty | None = None
    frequency_penalty: _Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    logit_bias: (
        Annotated[
            dict[str, Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_LOGIT_BIAS),
            _at_most(MAX_LOGIT_BIAS),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=-INT64, lt=INT64)] | None = None
    stop: (
        Annotated[
            Annotated[_StopString, Tag("string")]
            | Annotated[list[_StopString], Field(max_length=MAX_STOP_STRINGS), Tag("list")],
            Discriminator(
                _string_or("list", list),
                custom_error_type="stop_type",
                custom_error_message="Input should be a string or a list of strings",
            ),
        ]
        | None
    ) = None
    stop_token_ids: Annotated[list[int], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None

    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None

    user: str | None = None
    safety_identifier: str | None = None
    metadata: (
        Annotated[dict[_MetadataKey, _MetadataValue], Field(max_length=MAX_METADATA), _at_most(MAX_METADATA)] | None
    ) = None
    store: bool | None = None
    service_tier: Literal["auto", "default", "flex", "scale", "priority", "fast"] | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    prediction: dict[str, Any] | None = None
    modalities: Annotated[list[str], Field(max_length=8)] | None = None
    audio: dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    reasoning: dict[str, Any] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None

    @property
    def num_choices(self) -> int:
        return self.n or 1

    @property
    def stop_strings(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def requested_tokens(self) -> int | None:
        """Most tokens to sample; None: as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def requested_tokens_field(self) -> str:
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


def parse_chat_request(data: dict[str, Any]) -> ChatRequest:
    """The request in ``data``. Raises InvalidRequest naming the field that is wrong or not supported."""
    for name in data:
        if name.startswith("chat_template") or name in NEVER:
            raise _unsupported(name[:80], "This server takes it from no request: leave it out.")
        if name not in ChatRequest.model_fields and name not in NOT_BUILT:
            raise unrecognized(name)
    for name, sentence in NOT_BUILT.items():
        if data.get(name) is not None:
            raise _unsupported(name, sentence)
    request = validate(ChatRequest, {name: value for name, value in data.items() if name not in NOT_BUILT})
    _refuse_unbuilt(request)
    for index, message in enumerate(request.messages):
        _check_message(message, f"messages[{index}]")
    _check_together(request)
    return request


def _refuse_unbuilt(request: ChatRequest) -> None:
    tools = "Tool calling is not available on this server yet"
    if request.response_format is not None and request.response_format.type != "text":
        raise _unsupported(
            "response_format", "Only {'type': 'text'} is available on this server yet; ask for JSON in the prompt."
        )
    if request.tools:
        raise _unsupported("tools", f"{tools}: leave 'tools' out.")
    if request.tool_choice not in (None, "none", "auto"):
        raise _unsupported("tool_choice", f"{tools}: only 'none' and 'auto' without 'tools' are accepted.")
    if request.functions:
        raise _unsupported("functions", f"{tools}: leave 'functions' out.")
    if request.function_call not in (None, "none", "auto"):
        raise _unsupported("function_call", f"{tools}: only 'none' and 'auto' without 'functions' are accepted.")
    if request.modalities is not None and request.modalities != ["text"]:
        raise _unsupported("modalities", "This server answers in text only: use ['text'].")
    if request.store:
        raise _unsupported("store", "This server stores no completions: use false or leave 'store' out.")


def _check_message(message: ChatMessage, param: str) -> None:
    if message.role in ("tool", "function"):
        raise _unsupported(
            f"{param}.role", f"Messages of role {message.role!r} need tool calling, which is not available yet."
        )
    if message.tool_calls or message.function_call is not None:
        name = "tool_calls" if message.tool_calls else "function_call"
        raise _unsupported(f"{param}.{name}", "Tool calling is not available on this server yet.")
    if message.content is None:
        raise InvalidRequest(
            f"Invalid '{param}.content': a message of role {message.role!r} needs a string or a list of parts.",
            param=f"{param}.content",
        )
    if message.role != "assistant" and isinstance(message.content, list):
        for index, part in enumerate(message.content):
            if isinstance(part, RefusalContent):
                where = f"{param}.content[{index}].type"
                raise InvalidRequest(f"Invalid {where!r}: only an assistant's message holds a refusal.", param=where)


def _check_together(request: ChatRequest) -> None:
    if request.top_logprobs and not request.logprobs:
        raise InvalidRequest("'top_logprobs' needs 'logprobs': true.", param="top_logprobs")
    limit = request.requested_tokens
    if limit is not None and request.min_tokens is not None and request.min_tokens > limit:
        raise InvalidRequest(
            f"'min_tokens' ({request.min_tokens}) is greater than '{request.requested_tokens_field}' ({limit}).",
            param="min_tokens",
        )


def _unsupported(param: str, sentence: str) -> InvalidRequest:
    return InvalidRequest(f"Unsupported parameter: {param!r}. {sentence}", code="unsupported_parameter", param=param)
