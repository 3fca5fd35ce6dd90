"""A checkpoint's text side: chats to token ids with room for pictures, and ids back to text.

Knows the files of a checkpoint folder and where images stand in a prompt. Templates, encoding and decoding have rooms
of their own: `chat_template.py`, `text_encoder.py`, `detokenizer.py`.
"""

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
    TemplateMaker,
    TextPart,
    TokenizerError,
)
from sightline_models.checkpoint_folder import (
    MAX_TEMPLATE_BYTES,
    MAX_TOKENIZER_BYTES,
    CheckpointError,
    find_file,
    read_object,
    read_settings,
    read_text,
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
    "read_chat_template",
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
        self,
        spec: Mapping[str, Any],
        settings: Mapping[str, Any],
        template: str,
        image_token_id: int,
        make_template: TemplateMaker = ChatTemplate,
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
        self._template = make_template(template, named, self._image_token, frozenset(contents.values()))
        self.vocab_size = len(self._tokens.table)
        """One more than the highest id that has a token; a padded model may know more ids."""

    @classmethod
    def load(
        cls,
        folder: Path,
        config: VlmConfig,
        *,
        chat_template: str | None = None,
        make_template: TemplateMaker = ChatTemplate,
    ) -> "ChatTokenizer":
        """The tokenizer of a checkpoint folder, with ``chat_template`` (Jinja text) in place of its own if given.

        ``make_template`` decides where the template runs: by itself, in this process. Raises TokenizerError or
        CheckpointError, naming the file and the fix, when something is missing or can't be read.
        """
        file = find_file(folder, "tokenizer.json")
        if file is None:
            raise TokenizerError(_no_tokenizer(folder))
        try:
            return cls._of_files(folder, config, read_object(file, MAX_TOKENIZER_BYTES), chat_template, make_template)
        except (CheckpointError, TokenizerError):
            raise
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise TokenizerError(
                f"{folder.name}: tokenizer.json or tokenizer_config.json doesn't have the form it should "
                f"({type(error).__name__}). Copy both from the original checkpoint."
            ) from error

    @classmethod
    def _of_files(
        cls,
        folder: Path,
        config: VlmConfig,
        spec: dict[str, Any],
        chat_template: str | None,
        make_template: TemplateMaker,
    ) -> "ChatTokenizer":
        settings = _read_settings(folder, "tokenizer_config.json")
        _add_missing_tokens(spec, settings)
        template = chat_template or _find_template(folder, settings)
        if template is None:
            if not config.is_llava15:
                raise TokenizerError(
                    f"{folder.name} has no chat template, and config.json doesn't say LLaVA-1.5, whose form is known. "
                    "Give a Jinja template with --chat-template."
                )
            template = VICUNA_TEMPLATE
        if len(template) > MAX_TEMPLATE_BYTES:
            raise TokenizerError(
                f"{folder.name}: the chat template has more than {MAX_TEMPLATE_BYTES} characters. "
                "Give another one with --chat-template."
            )
        return cls(spec, settings, template, config.image_token_id, make_template)

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


def read_chat_template(file: str) -> str | None:
    """The Jinja text that an operator gives in place of a checkpoint's, or None where ``file`` is empty.

    Raises CheckpointError for a file that can't be read, isn't text, or is larger than any template.
    """
    return read_text(Path(file), MAX_TEMPLATE_BYTES) if file else None


def _no_tokenizer(folder: Path) -> str:
    if (folder / "tokenizer.model").is_file():
        return (
            f"{folder.name} has tokenizer.model but no tokenizer.json. Make one with transformers, sentencepiece and "
            "protobuf: AutoTokenizer.from_pretrained(DIR).save_pretrained(DIR)."
        )
    return f"{folder.name} has no tokenizer.json: copy it from the original checkpoint."


def _read_settings(folder: Path, name: str) -> dict[str, Any]:
    file = find_file(folder, name)
    return {} if file is None else read_settings(file)


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
    if (file := find_file(folder, "chat_template.jinja")) is not None:
        return read_text(file, MAX_TEMPLATE_BYTES)
    for name in ("chat_template.json", "processor_config.json"):
        if template := _read_settings(folder, name).get("chat_template"):
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
