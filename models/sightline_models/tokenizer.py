"""A checkpoint's text side: chats to token ids with room for pictures, and ids back to text.

Knows the files of a checkpoint folder and where images stand in a prompt. Templates, encoding and decoding have rooms
of their own: `chat_template.py`, `text_encoder.py`, `detokenizer.py`.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from sightline_models.chat_template import (
    VICUNA_TEMPLATE,
    ChatTemplate,
    ImagePart,
    Message,
    Span,
    TextPart,
    TokenizerError,
)
from sightline_models.config import VlmConfig
from sightline_models.detokenizer import Detokenizer, TokenBytes, read_token_bytes
from sightline_models.text_encoder import TextEncoder, make_tokenizer

__all__ = [
    "ChatTokenizer",
    "Detokenizer",
    "EncodedChat",
    "ImagePart",
    "Message",
    "TextPart",
    "TokenizerError",
]

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class EncodedChat:
    """A prompt's tokens, image placeholders repeated as often as their image has tokens."""

    token_ids: tuple[int, ...]
    image_starts: tuple[int, ...]
    """Where each image's placeholders begin, in the order of the images."""


class ChatTokenizer:
    """Made by ``load``; holds no state of any request."""

    def __init__(
        self, spec: Mapping[str, Any], settings: Mapping[str, Any], template: str, image_token_id: int
    ) -> None:
        """``spec`` is the content of ``tokenizer.json``, ``settings`` that of ``tokenizer_config.json``."""
        tokenizer = make_tokenizer({**spec, "padding": None, "truncation": None})
        contents = {token["id"]: token["content"] for token in spec["added_tokens"]}
        if image_token_id not in contents:
            raise TokenizerError(
                f"config.json's image token {image_token_id} is no added token of tokenizer.json: pictures have no "
                "place in the text. Copy tokenizer.json from the checkpoint that config.json is from."
            )
        named = _named_tokens(settings)
        special = {
            token["id"] for token in spec["added_tokens"] if token.get("special") or token["content"] in named.values()
        }
        self._image_token_id = image_token_id
        self._image_token = contents[image_token_id]
        self._encoder = TextEncoder(spec)
        self._tokens: TokenBytes = read_token_bytes(tokenizer, spec.get("decoder"), frozenset(special))
        self._bos_token = named.get("bos_token")
        self._before, self._after = _affixes(tokenizer)
        self._template = ChatTemplate(template, named, self._image_token, frozenset(contents.values()))
        self.vocab_size = len(self._tokens.table)
        """One more than the highest id that has a token; a padded model may know more ids."""

    @classmethod
    def load(cls, folder: Path, config: VlmConfig, *, chat_template: str | None = None) -> "ChatTokenizer":
        """The tokenizer of a checkpoint folder, with ``chat_template`` (Jinja text) in place of its own if given.

        Raises TokenizerError, naming the file and the fix, when something is missing or can't be read.
        """
        spec = _read_json(folder / "tokenizer.json")
        if spec is None:
            raise TokenizerError(_no_tokenizer(folder))
        settings = _read_json(folder / "tokenizer_config.json") or {}
        _add_missing_tokens(spec, settings)
        template = chat_template or _find_template(folder, settings)
        if template is None:
            if not config.is_llava15:
                raise TokenizerError(
                    f"{folder.name} has no chat template, and config.json doesn't say LLaVA-1.5, whose form is known. "
                    "Give a Jinja template with --chat-template."
                )
            template = VICUNA_TEMPLATE
        return cls(spec, settings, template, config.image_token_id)

    def encode_chat(self, messages: Sequence[Message], image_lengths: Sequence[int]) -> EncodedChat:
        """The prompt up to where the answer begins, ``image_lengths[i]`` placeholders for the i-th image.

        Control tokens come from the template alone; the user's text never makes one. Raises TokenizerError where the
        template refuses the messages or doesn't place every image.
        """
        spans = self._template.render(messages)
        ids = self._encoder.encode(spans)
        if not self._starts_with_bos(spans):
            ids = [*self._before, *ids, *self._after]
        images = sum(isinstance(part, ImagePart) for message in messages for part in message.parts)
        assert images == len(image_lengths), f"{images} image parts, {len(image_lengths)} lengths"
        placed = ids.count(self._image_token_id)
        if placed != images:
            raise TokenizerError(
                f"The chat template wrote {placed} image placeholders for {images} images. Put images into user "
                "messages only, or serve the model with another --chat-template."
            )
        expanded: list[int] = []
        starts: list[int] = []
        for token_id in ids:
            if token_id == self._image_token_id:
                starts.append(len(expanded))
                expanded += [token_id] * image_lengths[len(starts) - 1]
            else:
                expanded.append(token_id)
        return EncodedChat(tuple(expanded), tuple(starts))

    def encode_text(self, text: str) -> list[int]:
        """A user's text alone, without a beginning-of-sequence token; never a control token."""
        return self._encoder.encode([Span(text, by_user=True)])

    def token_text(self, token_id: int) -> str:
        """What one token shows by itself; parts of a character as U+FFFD, an id without a token as nothing."""
        return self.token_bytes(token_id).decode(errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        return self._tokens.of(token_id)

    def is_special(self, token_id: int) -> bool:
        return token_id in self._tokens.hidden

    def detokenizer(self) -> Detokenizer:
        return Detokenizer(self._tokens)

    def _starts_with_bos(self, spans: Sequence[Span]) -> bool:
        """Whether the template writes the beginning-of-sequence token itself, so that a second would be wrong."""
        return bool(self._bos_token and spans and not spans[0].by_user and spans[0].text.startswith(self._bos_token))


def _no_tokenizer(folder: Path) -> str:
    if (folder / "tokenizer.model").is_file():
        return (
            f"{folder.name} has tokenizer.model but no tokenizer.json. Make one with transformers, sentencepiece and "
            "protobuf: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)."
        )
    return f"{folder.name} has no tokenizer.json: copy it from the original checkpoint."


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        value = None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path.name} is no JSON object; copy it from the original checkpoint.")
    return value


def _content(token: Any) -> str | None:
    """A token is written as its text or as an object that holds it."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _named_tokens(settings: Mapping[str, Any]) -> dict[str, str]:
    more = settings.get("model_specific_special_tokens")
    given = {name: settings.get(name) for name in _NAMED_TOKENS} | (more if isinstance(more, dict) else {})
    return {name: text for name, token in given.items() if (text := _content(token)) is not None}


def _add_missing_tokens(spec: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """Tokens that only ``tokenizer_config.json`` adds, as some published checkpoints do for the image token."""
    known = {token["content"] for token in spec.setdefault("added_tokens", [])}
    for number, token in sorted((settings.get("added_tokens_decoder") or {}).items(), key=lambda item: int(item[0])):
        if token["content"] not in known:
            spec["added_tokens"] = [*spec["added_tokens"], {**token, "id": int(number)}]


def _find_template(folder: Path, settings: Mapping[str, Any]) -> str | None:
    """A processor's template before the tokenizer's: the latter may not know of pictures."""
    if (file := folder / "chat_template.jinja").is_file():
        return file.read_text("utf-8")
    for name in ("chat_template.json", "processor_config.json"):
        if template := (_read_json(folder / name) or {}).get("chat_template"):
            return str(template)
    template = settings.get("chat_template")
    if isinstance(template, list):
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    return template if isinstance(template, str) else None


def _affixes(tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids that the post-processor sets before and after every text, such as the beginning-of-sequence token.

    ``add_bos_token`` and ``add_eos_token`` of tokenizer_config.json count for nothing beside a tokenizer.json, in
    transformers as here.
    """
    encoding = tokenizer.encode("a", add_special_tokens=True)
    text = [index for index, special in enumerate(encoding.special_tokens_mask) if not special]
    if not text:
        return [], []
    return list(encoding.ids[: text[0]]), list(encoding.ids[text[-1] + 1 :])
