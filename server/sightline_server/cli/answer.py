"""Shows one streamed answer on a terminal or in a pipe, with a line of figures below it when a person looks on."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from sightline_server.cli.chat_client import AnswerStream, ChatClient
from sightline_server.cli.conversation import Message


@dataclass(frozen=True)
class Shown:
    """What reached the screen."""

    text: str
    stopped: bool
    """Ctrl-C ended it."""


def show_answer(client: ChatClient, messages: Sequence[Message], options: Mapping[str, Any]) -> Shown:
    """Stream the answer to standard output as it comes. Ctrl-C stops it and closes the stream.

    Figures and the wait before the first word are shown only when standard output is a terminal.
    Raises ChatError, after ending the line of what was printed so far.
    """
    person = sys.stdout.isatty()
    console = Console(stderr=True, highlight=False)
    pieces: list[str] = []
    stopped = False
    waiting = console.status("waiting for the first word", spinner="dots") if person and console.is_terminal else None
    if waiting:
        waiting.start()
    try:
        with client.ask(messages, options) as answer:
            for piece in answer:
                if waiting:
                    waiting.stop()
                # Templates leave a space or a newline in front of the first word.
                piece = piece if pieces else piece.lstrip()
                if piece:
                    pieces.append(piece)
                    sys.stdout.write(piece)
                    sys.stdout.flush()
    except KeyboardInterrupt:
        stopped = True
    finally:
        if waiting:
            waiting.stop()
        if pieces and not pieces[-1].endswith("\n"):
            sys.stdout.write("\n")
        sys.stdout.flush()
    if person:
        note = "stopped" if stopped else figures(answer)
        console.print(Text(note, style="dim"))
    return Shown("".join(pieces), stopped)


def figures(answer: AnswerStream) -> str:
    """Such as ``42 tokens · 31.5 tokens/s · first word after 0.21 s · 576 of 598 prompt tokens cached``."""
    parts = []
    if answer.completion_tokens:
        parts.append(f"{answer.completion_tokens} token{'s' if answer.completion_tokens > 1 else ''}")
    if answer.tokens_per_s is not None:
        parts.append(f"{answer.tokens_per_s:.1f} tokens/s")
    if answer.first_text_s is not None:
        parts.append(f"first word after {answer.first_text_s:.2f} s")
    if answer.prompt_tokens:
        parts.append(f"{answer.cached_tokens} of {answer.prompt_tokens} prompt tokens cached")
    if answer.finish_reason == "length":
        parts.append("cut off at the token limit")
    return " · ".join(parts)
