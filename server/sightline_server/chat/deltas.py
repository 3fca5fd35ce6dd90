"""One choice's tokens made into text: whole characters, no part of a stop string, nothing behind one.

Knows tokens, text and stop strings. Knows no engine, no wire and no other choice.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from sightline_server.engine.types import FinishReason, TokenEvent


class Detokenizer(Protocol):
    def push(self, token_id: int) -> str: ...
    def flush(self) -> str: ...


@dataclass(frozen=True)
class TextDelta:
    text: str
    tokens: tuple[TokenEvent, ...] = ()
    """The tokens whose text begins in ``text``; kept only where log probabilities were asked for."""
    finish: FinishReason | None = None

    def __add__(self, other: "TextDelta") -> "TextDelta":
        return TextDelta(self.text + other.text, self.tokens + other.tokens, other.finish or self.finish)

    def __bool__(self) -> bool:
        return bool(self.text or self.tokens or self.finish)


class ChoiceText:
    """Feed it every TokenEvent, then the reason of the end; it hands out what may be shown so far."""

    def __init__(
        self, detokenizer: Detokenizer, *, stop: Sequence[str] = (), min_tokens: int = 0, logprobs: bool = False
    ) -> None:
        self._detokenizer = detokenizer
        self._stop = tuple(stop)
        self._min_tokens = min_tokens
        self._logprobs = logprobs
        self._held = ""
        self._shown = 0
        # Each waiting token with the place in the text where it begins.
        self._tokens: deque[tuple[int, TokenEvent]] = deque()
        self.num_tokens = 0
        self.finished = False
        self.stopped = False
        """Whether a stop string ended it."""

    def push(self, event: TokenEvent) -> TextDelta:
        """What the token adds. ``finish`` is set when it completed a stop string; nothing follows then."""
        assert not self.finished, "a token came after the choice had ended"
        self.num_tokens += 1
        if self._logprobs:
            self._tokens.append((self._shown + len(self._held), event))
        self._held += self._detokenizer.push(event.token_id)
        if self.num_tokens < self._min_tokens:
            return self._show(len(self._held))
        return self._advance()

    def end(self, reason: FinishReason) -> TextDelta:
        """What is left when the engine ends the choice."""
        assert not self.finished, "a choice ends once"
        self._held += self._detokenizer.flush()
        delta = self._advance()
        if delta.finish is not None:
            return delta
        self.finished = True
        rest = delta + self._show(len(self._held))
        tail = tuple(event for _, event in self._tokens)
        return TextDelta(rest.text, rest.tokens + tail, reason)

    def _advance(self) -> TextDelta:
        """Show all that can't be part of a stop string any more."""
        if not self._stop:
            return self._show(len(self._held))
        found = min((at for at in map(self._held.find, self._stop) if at >= 0), default=-1)
        if found >= 0:
            self.finished = self.stopped = True
            shown = self._show(found)
            return TextDelta(shown.text, shown.tokens, FinishReason.STOP)
        return self._show(len(self._held) - self._partial())

    def _partial(self) -> int:
        """The length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stop):
                return length
        return 0

    def _show(self, length: int) -> TextDelta:
        text, self._held = self._held[:length], self._held[length:]
        self._shown += length
        tokens = []
        while self._tokens and self._tokens[0][0] < self._shown:
            tokens.append(self._tokens.popleft()[1])
        return TextDelta(text, tuple(tokens))
