"""A chat request's messages and pictures made into the model's input. Knows texts, token ids and digests; no pixels."""

from collections.abc import Sequence
from dataclasses import dataclass

from sightline_models.tokenizer import ImagePart, Message, TextPart, TokenizerError
from sightline_server.chat.decode_pool import ImageHandle
from sightline_server.chat.model import ServedModel
from sightline_server.engine.types import ImageSpan, Prompt
from sightline_server.errors import InvalidRequest
from sightline_server.protocol.chat import ChatMessage, ImageContent, RefusalContent

MAX_CHARS_PER_TOKEN = 128
"""No token of any served vocabulary is longer, so longer texts are refused without being tokenized."""


@dataclass(frozen=True)
class ImagePlace:
    """Where in the request a picture stands, and its URL."""

    param: str
    url: str


def image_places(messages: Sequence[ChatMessage]) -> list[ImagePlace]:
    """Every picture, in the order the model will see them."""
    return [
        ImagePlace(f"messages[{row}].content[{column}].image_url", part.url)
        for row, message in enumerate(messages)
        if isinstance(message.content, list)
        for column, part in enumerate(message.content)
        if isinstance(part, ImageContent)
    ]


def build_prompt(
    messages: Sequence[ChatMessage], images: Sequence[ImageHandle], model: ServedModel, context_length: int
) -> Prompt:
    """Render and tokenize; long texts take a while, so call it off the event loop.

    Raises InvalidRequest for messages the template doesn't take, or that can't fit.
    """
    rendered = template_messages(messages)
    _refuse_hopeless(rendered, context_length)
    try:
        encoded = model.tokenizer.encode_chat(rendered, [image.num_tokens for image in images])
    except TokenizerError as error:
        raise InvalidRequest(str(error), param="messages") from None
    assert len(encoded.image_starts) == len(images), f"{len(encoded.image_starts)} spans for {len(images)} images"
    spans = tuple(
        ImageSpan(start, image.num_tokens, image.digest)
        for start, image in zip(encoded.image_starts, images, strict=True)
    )
    return Prompt(encoded.token_ids, spans)


def _refuse_hopeless(messages: Sequence[Message], context_length: int) -> None:
    """Raises InvalidRequest for what can't fit however it is tokenized, before that takes seconds."""
    characters = sum(len(part.text) for message in messages for part in message.parts if isinstance(part, TextPart))
    # A message takes a token at the very least.
    if characters > context_length * MAX_CHARS_PER_TOKEN or len(messages) > context_length:
        raise InvalidRequest(
            f"This model's maximum context length is {context_length} tokens. However, your {len(messages)} messages "
            f"hold {characters} characters, which is more than {context_length} tokens. "
            "Please reduce the length of the messages.",
            code="context_length_exceeded",
            param="messages",
        )


def template_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """The messages in the three roles that templates know.

    ``developer`` is the newer name of ``system``. Strict templates take one system message, and only in front, so
    those that open the conversation become one.
    """
    made: list[Message] = []
    for message in messages:
        role = "system" if message.role == "developer" else message.role
        parts = _parts(message)
        if role == "system" and len(made) == 1 and made[0].role == "system":
            made[0] = Message("system", (*made[0].parts, TextPart("\n\n"), *parts))
        else:
            made.append(Message(role, parts))
    return made


def _parts(message: ChatMessage) -> tuple[TextPart | ImagePart, ...]:
    assert message.content is not None, "content was checked when the request was parsed"
    if isinstance(message.content, str):
        return (TextPart(message.content),)
    return tuple(
        ImagePart()
        if isinstance(part, ImageContent)
        else TextPart(part.refusal if isinstance(part, RefusalContent) else part.text)
        for part in message.content
    )
