"""Token ids back to text, a token at a time.

Knows the decoders of byte-level BPE and of SentencePiece vocabularies. Knows no templates and no requests.
"""

import codecs
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer

from sightline_models.chat_template import TokenizerError

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


@dataclass(frozen=True)
class TokenBytes:
    """What every token stands for, in bytes of UTF-8."""

    table: tuple[bytes, ...]
    """By id; empty for ids without a token."""
    hidden: frozenset[int]
    """The special tokens, which no text shows."""
    leading_spaces: int
    """How many spaces at the very beginning of a text are the vocabulary's, not the author's."""

    def of(self, token_id: int) -> bytes:
        return self.table[token_id] if 0 <= token_id < len(self.table) else b""


class Detokenizer:
    """One answer's tokens to text; a character is shown once its last byte has come."""

    def __init__(self, tokens: TokenBytes) -> None:
        self._tokens = tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes: empty for a special token or a part of a character."""
        data = b"" if token_id in self._tokens.hidden else self._tokens.of(token_id)
        if self._at_start and data:
            self._at_start = False
            for _ in range(self._tokens.leading_spaces):
                data = data.removeprefix(b" ")
        return self._decoder.decode(data)

    def flush(self) -> str:
        """The text still held back when no more tokens come: none, for only parts of a character ever are."""
        self._decoder.reset()
        return ""


def read_token_bytes(tokenizer: Tokenizer, decoder: Mapping[str, Any] | None, special: frozenset[int]) -> TokenBytes:
    """For ``decoder`` as ``tokenizer.json`` has it. Raises TokenizerError for a kind that isn't known."""
    to_bytes, leading_spaces = _read_decoder(decoder or {})
    size = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1
    pieces = [tokenizer.id_to_token(token_id) or "" for token_id in range(size)]
    table = [piece.encode() if token_id in special else to_bytes(piece) for token_id, piece in enumerate(pieces)]
    return TokenBytes(tuple(table), special, leading_spaces)


def _read_decoder(decoder: Mapping[str, Any]) -> tuple[Callable[[str], bytes], int]:
    """What a piece stands for, and how many leading spaces of a text are dropped."""
    steps = decoder.get("decoders", [decoder])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"]:
        return _from_byte_level, 0
    if not kinds or not set(kinds) <= {"Metaspace", "Replace", "ByteFallback", "Fuse", "Strip"}:
        named = " + ".join(map(str, kinds))
        raise TokenizerError(
            f"tokenizer.json's decoder {named} is not supported: only byte-level and SentencePiece ones are."
        )
    replacements: list[tuple[str, str]] = []
    leading_spaces = 0
    for step in steps:
        if step["type"] == "Metaspace":
            replacements.append((step.get("replacement", "▁"), " "))
            leading_spaces = 0 if step.get("prepend_scheme") == "never" else 1
        elif step["type"] == "Replace":
            replacements.append((step["pattern"]["String"], step["content"]))
        elif step["type"] == "Strip" and step["content"] == " ":
            leading_spaces = int(step["start"])

    def from_pieces(piece: str) -> bytes:
        if "ByteFallback" in kinds and (byte := _BYTE_TOKEN.fullmatch(piece)):
            return bytes([int(byte[1], 16)])
        for old, new in replacements:
            piece = piece.replace(old, new)
        return piece.encode()

    return from_pieces, leading_spaces


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE writes bytes as printable characters: itself where it is one, else one from 256 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _from_byte_level(piece: str) -> bytes:
    # A piece with any other character was added as it is.
    if all(character in _ALPHABET for character in piece):
        return bytes(_ALPHABET[character] for character in piece)
    return piece.encode()
