"""The interactive chat: a prompt line with history, commands, pictures by path, streamed answers.

Knows the keyboard and what a person meant. Knows nothing of HTTP; the history stays in memory, never on disk.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sightline_server.cli import line_editor
from sightline_server.cli.answer import show_answer
from sightline_server.cli.chat_client import ChatClient, ChatError
from sightline_server.cli.conversation import Conversation
from sightline_server.cli.pictures import PictureError, as_path, read_picture, split_paths, take_apart
from sightline_server.cli.terminal import one_line, sendable


@dataclass(frozen=True)
class Command:
    run: Callable[[str], None]
    argument: str
    help: str


class Quit(Exception):
    """The person asked to leave."""


class ChatSession:
    """One sitting at one server."""

    def __init__(self, client: ChatClient, conversation: Conversation, options: Mapping[str, Any]) -> None:
        self._client = client
        self._conversation = conversation
        self._options = dict(options)
        self._console = Console(highlight=False)
        self._commands = {
            "/image": Command(self._image, "PATH ...", "attach pictures to the next question"),
            "/images": Command(self._images, "", "show what is attached and what was sent"),
            "/detach": Command(self._detach, "", "drop the pictures attached to the next question"),
            "/system": Command(self._system, "TEXT", "set the system message; without TEXT, remove it"),
            "/clear": Command(self._clear, "", "start a new conversation"),
            "/save": Command(self._save, "FILE", "write the conversation, pictures included, as JSON"),
            "/help": Command(self._help, "", "show this list"),
            "/quit": Command(self._quit, "", "leave (so does Ctrl-D)"),
        }

    def run(self) -> None:
        """Read lines until the person leaves."""
        line_editor.prepare(list(self._commands))
        self._say(f"{self._options['model']} at {self._client.url}")
        self._say("Ask away. A picture's path in the question attaches it. /help lists the commands.", style="dim")
        while True:
            try:
                self._obey(sendable(input(self._prompt())).strip())
            except (EOFError, Quit):
                self._say("")
                return
            except KeyboardInterrupt:
                self._say("\nCtrl-D or /quit leaves.", style="dim")
            except UnicodeDecodeError:
                self._say("That line is not UTF-8 text, so it was dropped.", style="red")
            except (ChatError, PictureError) as error:
                self._say(str(error), style="red")

    def _prompt(self) -> str:
        waiting = len(self._conversation.waiting)
        return f"[{waiting} picture{'s' if waiting > 1 else ''}] > " if waiting else "> "

    def _say(self, sentence: str, *, style: str = "") -> None:
        self._console.print(Text(sentence, style=style))

    def _obey(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        if not line:
            return
        if word in self._commands:
            self._commands[word].run(rest.strip())
        elif word.startswith("/") and "/" not in word[1:] and not as_path(word).exists():
            self._say(f"There is no command {one_line(word)}. /help lists them.", style="red")
        else:
            self._question(line)

    def _question(self, line: str) -> None:
        parts = take_apart(line)
        if parts.missing:
            names = ", ".join(one_line(name) for name in parts.missing)
            self._say(
                f"There is no file {names}, so nothing was sent. The Up key brings the line back; "
                "a path that is meant as text goes in `backquotes`.",
                style="red",
            )
            return
        self._attach(parts.paths)
        if not parts.question:
            return
        shown = show_answer(self._client, self._conversation.ask(parts.question), self._options)
        if shown.text:
            self._conversation.answered(parts.question, shown.text)
        elif not shown.stopped:
            self._say("The model answered with no words.", style="dim")

    def _attach(self, paths: tuple[Path, ...] | list[Path]) -> None:
        # All are read before any is attached, so that a failed line leaves nothing behind.
        for picture in [read_picture(path) for path in paths]:
            if self._conversation.attach(picture):
                self._say(f"attached {picture.label}", style="dim")

    def _image(self, text: str) -> None:
        paths = split_paths(text)
        if not paths:
            self._say("Which picture? /image PATH, several with spaces between them, quotes where a path has spaces.")
        self._attach(paths)

    def _images(self, _: str) -> None:
        if not self._conversation.waiting and not self._conversation.sent:
            self._say("No pictures yet. /image PATH attaches one.")
        for picture in self._conversation.sent:
            self._say(f"sent      {picture.label}")
        for picture in self._conversation.waiting:
            self._say(f"attached  {picture.label}")

    def _detach(self, _: str) -> None:
        self._conversation.detach()
        self._say("Nothing is attached to the next question.", style="dim")

    def _system(self, text: str) -> None:
        self._conversation.system = text
        self._say("System message set." if text else "System message removed.", style="dim")

    def _clear(self, _: str) -> None:
        self._conversation.clear()
        self._say("New conversation.", style="dim")

    def _save(self, text: str) -> None:
        paths = split_paths(text)
        if len(paths) != 1:
            self._say("Where to? /save FILE")
            return
        transcript = {"model": self._options["model"], "messages": self._conversation.messages}
        shown = one_line(str(paths[0]))
        try:
            with paths[0].open("x", encoding="utf-8") as file:
                json.dump(transcript, file, ensure_ascii=False, indent=2)
                file.write("\n")
        except FileExistsError:
            self._say(f"{shown} exists already; choose another name.", style="red")
        except OSError as error:
            self._say(f"{shown} can't be written: {error.strerror}.", style="red")
        else:
            turns = len(self._conversation)
            self._say(f"Saved {turns} turn{'s' if turns != 1 else ''} to {shown}.", style="dim")

    def _help(self, _: str) -> None:
        table = Table.grid(padding=(0, 2))
        for name, command in self._commands.items():
            table.add_row(Text(f"{name} {command.argument}".rstrip(), style="bold"), command.help)
        self._console.print(table)
        self._say(
            "A picture's path in a question attaches it too: typed, pasted or dropped on the window. Ctrl-C stops an "
            "answer. Tab completes commands and paths.",
            style="dim",
        )

    def _quit(self, _: str) -> None:
        raise Quit
