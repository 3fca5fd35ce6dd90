"""Text spans to token ids, with control tokens recognised only in what the template wrote.

Knows added tokens and the tokenizers package. Knows no messages and no pictures.

The text is cut at the added tokens that lie in template-written spans, by the rules the tokenizers package cuts by,
and each stretch in between is encoded whole by a tokenizer that has no added tokens: whatever the user wrote, no added
token comes out. Stretches are not cut where authors change, since that would change the ids of ordinary text.
"""

import copy
import json
import re
import secrets
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from tokenizers import NormalizedString, Tokenizer

from sightline_models.chat_template import Span, TokenizerError

_SURROGATE = re.compile("[\ud800-\udfff]")

IsUsers = Callable[[int, int], bool]
"""Whether any character between two offsets was written by the user."""


@dataclass(frozen=True)
class AddedToken:
    """As ``tokenizer.json`` describes it."""

    id: int
    content: str
    special: bool = False
    single_word: bool = False
    lstrip: bool = False
    rstrip: bool = False
    normalized: bool = True

    @classmethod
    def from_json(cls, token: Mapping[str, Any]) -> "AddedToken":
        return cls(**{field.name: token[field.name] for field in fields(cls) if field.name in token})


class TextEncoder:
    """Encodes by ``spec``, the content of a ``tokenizer.json``.

    Raises TokenizerError for one that the tokenizers package doesn't take.
    """

    def __init__(self, spec: Mapping[str, Any]) -> None:
        added = [AddedToken.from_json(token) for token in spec["added_tokens"]]
        self._plain_spec = _without_added_tokens(spec, added)
        self._encoders: dict[tuple[bool, bool], Tokenizer] = {}
        self._normalizer = self._encoder(at_start=True, normalize=True).normalizer
        self._literal = _Matcher((token.content, token) for token in added if not token.normalized)
        self._normalized = _Matcher((self._normalize(token.content), token) for token in added if token.normalized)

    def encode(self, spans: Iterable[Span]) -> list[int]:
        """The ids of the text that ``spans`` make together, without anything a post-processor would add.

        Raises TokenizerError for text that is no valid Unicode.
        """
        spans = tuple(spans)
        text = "".join(span.text for span in spans)
        if _SURROGATE.search(text):
            raise TokenizerError("The text holds half of a surrogate pair, which is no character. Send valid Unicode.")
        is_users = _authorship(spans)
        ids: list[int] = []
        for start, end, token_id in self._literal.cut(text, is_users):
            if token_id is not None:
                ids.append(token_id)
            else:
                ids += self._encode_stretch(text, start, end, is_users)
        return ids

    def _encode_stretch(self, text: str, start: int, end: int, is_users: IsUsers) -> list[int]:
        stretch = text[start:end]
        if not self._normalized.matches(self._normalize(stretch)):
            return self._encode_plain(stretch, at_start=start == 0, normalize=True)
        # These tokens are looked for in normalized text, and what lies between them is not normalized again.
        aligned = NormalizedString(stretch)
        if self._normalizer is not None:
            self._normalizer.normalize(aligned)
        folded, origin = aligned.normalized, _Origin(aligned)
        ids: list[int] = []

        def is_users_folded(low: int, high: int) -> bool:
            first, last = origin.of(low, high)
            return is_users(start + first, start + last)

        for low, high, token_id in self._normalized.cut(folded, is_users_folded):
            if token_id is not None:
                ids.append(token_id)
            else:
                ids += self._encode_plain(folded[low:high], at_start=start == low == 0, normalize=False)
        return ids

    def _encode_plain(self, text: str, *, at_start: bool, normalize: bool) -> list[int]:
        encoded = self._encoder(at_start, normalize).encode(text, add_special_tokens=False)
        return list(encoded.ids)

    def _encoder(self, at_start: bool, normalize: bool) -> Tokenizer:
        """A tokenizer without added tokens, for a stretch at the text's start or not, normalized already or not."""
        key = at_start, normalize
        if key not in self._encoders:
            spec = dict(self._plain_spec)
            if not at_start:
                spec["pre_tokenizer"] = _without_first_piece_rule(spec.get("pre_tokenizer"))
            if not normalize:
                spec["normalizer"] = None
            self._encoders[key] = make_tokenizer(spec)
        return self._encoders[key]

    def _normalize(self, text: str) -> str:
        return text if self._normalizer is None else str(self._normalizer.normalize_str(text))


def make_tokenizer(spec: Mapping[str, Any]) -> Tokenizer:
    try:
        return Tokenizer.from_str(json.dumps(spec))
    except Exception as error:
        raise TokenizerError(f"tokenizer.json is not one that the tokenizers package can read: {error}") from None


class _Matcher:
    """Finds added tokens in text: leftmost first, the longest of those that start at one place."""

    def __init__(self, tokens: Iterable[tuple[str, AddedToken]]) -> None:
        self._tokens = dict(tokens)
        self._longest_first = sorted(filter(None, self._tokens), key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, self._longest_first)) or r"(?!)")

    def matches(self, text: str) -> bool:
        return self._pattern.search(text) is not None

    def cut(self, text: str, is_users: IsUsers) -> Iterator[tuple[int, int, int | None]]:
        """(start, end, token id) of every piece of ``text`` in order; None as id for what lies between tokens.

        A token that touches the user's characters is none.
        """
        done = position = 0
        while (match := self._pattern.search(text, position)) is not None:
            start = match.start()
            content = self._longest_at(text, start, is_users)
            if content is None:
                position = start + 1
                continue
            token, end = self._tokens[content], start + len(content)
            position = end
            if token.single_word and (_is_word(text[start - 1 : start]) or _is_word(text[end : end + 1])):
                continue
            if token.lstrip:
                start = max(done, len(text[:start].rstrip()))
            if token.rstrip:
                end = len(text) - len(text[end:].lstrip())
            if start > done:
                yield done, start, None
            yield start, end, token.id
            done = end
            position = max(position, done)
        if done < len(text):
            yield done, len(text), None

    def _longest_at(self, text: str, start: int, is_users: IsUsers) -> str | None:
        for content in self._longest_first:
            if text.startswith(content, start) and not is_users(start, start + len(content)):
                return content
        return None


def _is_word(character: str) -> bool:
    return re.match(r"\w", character) is not None


def _authorship(spans: Sequence[Span]) -> IsUsers:
    edges = [0]
    for span in spans:
        edges.append(edges[-1] + len(span.text))

    def is_users(start: int, end: int) -> bool:
        first, last = bisect_right(edges, start) - 1, bisect_right(edges, end - 1) - 1
        return start < end and any(span.by_user for span in spans[first : last + 1])

    return is_users


class _Origin:
    """Where in the original text a part of its normalized form comes from; asked from left to right.

    A slice costs as much as the string it is taken from is long, hence a window that moves along.
    """

    _STRIDE = 4096

    def __init__(self, aligned: NormalizedString) -> None:
        self._aligned = aligned
        self._window = aligned
        # Where the window begins, in the normalized text and in the original.
        self._normalized = self._original = 0
        self._end = len(aligned.normalized)

    def of(self, low: int, high: int) -> tuple[int, int]:
        """Original offsets of the characters that [low, high) is made of, at least one."""
        if low >= self._normalized + self._STRIDE or high > self._end:
            self._move(low, high)
        first = self._original + self._length(self._normalized, low + 1) - 1
        return max(first, 0), self._original + self._length(self._normalized, high)

    def _move(self, low: int, high: int) -> None:
        """Begins the window at ``low``, unless one original character lies on both sides of it."""
        before, here, both = (_part(self._aligned, *ends) for ends in ((0, low), (low, low + 1), (0, low + 1)))
        if len(before.original) + len(here.original) == len(both.original):
            self._normalized, self._original = low, len(before.original)
        self._end = min(high + 2 * self._STRIDE, len(self._aligned.normalized))
        self._window = _part(self._aligned, self._normalized, self._end)

    def _length(self, low: int, high: int) -> int:
        return len(_part(self._window, low - self._normalized, high - self._normalized).original)


def _part(text: NormalizedString, low: int, high: int) -> NormalizedString:
    part = text.slice((low, high))
    assert part is not None, f"[{low}, {high}) of {len(text.normalized)} characters"
    return part


def _without_added_tokens(spec: Mapping[str, Any], added: Sequence[AddedToken]) -> dict[str, Any]:
    """``spec`` with every other id unchanged, and no way left to reach an added one by ordinary text."""
    plain = {**spec, "added_tokens": [], "post_processor": None, "padding": None, "truncation": None}
    model = copy.copy(spec["model"])
    plain["model"] = model
    gone = {token.id for token in added}
    vocabulary = model["vocab"]
    if isinstance(vocabulary, list):
        # Unigram: an id is a place in the list, so the entry stays, under a name that nobody can guess.
        model["vocab"] = [
            [_unwritable(), score] if number in gone else [piece, score]
            for number, (piece, score) in enumerate(vocabulary)
        ]
        return plain
    unknown = model.get("unk_token")
    removed = {piece for piece, number in vocabulary.items() if number in gone}
    model["vocab"] = {piece: number for piece, number in vocabulary.items() if piece not in removed}
    if unknown in removed:
        # Characters that the vocabulary lacks still become the unknown token; its name in a text doesn't.
        model["unk_token"] = _unwritable()
        model["vocab"][model["unk_token"]] = vocabulary[unknown]
    if removed and "merges" in model:
        model["merges"] = [merge for merge in model["merges"] if not _mentions(merge, removed)]
    return plain


def _mentions(merge: str | Sequence[str], removed: set[str]) -> bool:
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left in removed or right in removed or left + right in removed


def _unwritable() -> str:
    return f"\uffff{secrets.token_hex(16)}\uffff"


def _without_first_piece_rule(pre_tokenizer: Any) -> Any:
    """Metaspace may mark the beginning of the whole text only; a later stretch doesn't stand there."""
    if isinstance(pre_tokenizer, dict):
        return {
            name: "never" if (name, value) == ("prepend_scheme", "first") else _without_first_piece_rule(value)
            for name, value in pre_tokenizer.items()
        }
    if isinstance(pre_tokenizer, list):
        return [_without_first_piece_rule(item) for item in pre_tokenizer]
    return pre_tokenizer
