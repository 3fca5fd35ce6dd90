"""`sightline chat`: talk to a server, in a terminal or in a pipe. A plain client of /v1.

Knows flags, standard input and exit codes; the exchange is in `chat_client.py`, the prompt in `chat_session.py`.
"""

import argparse
import io
import sys
from pathlib import Path
from typing import Any

from sightline_server import settings
from sightline_server.cli.answer import show_answer
from sightline_server.cli.chat_client import ChatClient, ChatError
from sightline_server.cli.chat_session import ChatSession
from sightline_server.cli.conversation import Conversation
from sightline_server.cli.pictures import PictureError, read_picture
from sightline_server.cli.terminal import complain, discard_stdout, sendable

INTERRUPTED = 130
"""What shells expect of a program that Ctrl-C ended."""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "chat",
        help="ask a running server, with pictures",
        description="Ask a running server about text and pictures. Without QUESTION, in a terminal, it opens a prompt; "
        "in a pipe the question is read from standard input and only the answer is printed.",
        epilog="example: sightline chat --image cat.png 'What is in this picture?'",
    )
    parser.add_argument("question", nargs="?", metavar="QUESTION", help="what to ask")
    parser.add_argument(
        "--image", action="append", default=[], metavar="PATH", help="attach a picture; repeat for more"
    )
    parser.add_argument(
        "--url", help="the API's address (default: http://127.0.0.1:8000/v1, or what SIGHTLINE_HOST and _PORT say)"
    )
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="the key that the server wants, if any (default without --url: SIGHTLINE_API_KEY)",
    )
    parser.add_argument("--model", metavar="NAME", help="model to ask (default: the first that the server lists)")
    parser.add_argument("--system", default="", metavar="TEXT", help="system message")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 always takes the likeliest token")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="longest answer, in tokens")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Exit code: 0 answered, 1 not (the sentence is on standard error), 130 stopped by Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")
    try:
        return _chat(args)
    except (ChatError, PictureError, settings.SettingsError) as error:
        complain(str(error))
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        discard_stdout()
        return 1


def _chat(args: argparse.Namespace) -> int:
    pictures = [read_picture(Path(path).expanduser()) for path in args.image]
    url, api_key = _target(args)
    with ChatClient(url, api_key=api_key) as client:
        person = args.question is None and sys.stdin.isatty() and sys.stdout.isatty()
        # A person wants to hear that no server is there before typing a question, not after.
        names = client.model_names() if person or not args.model else []
        options: dict[str, Any] = {"model": args.model or names[0]}
        if args.temperature is not None:
            options["temperature"] = args.temperature
        if args.max_tokens is not None:
            options["max_completion_tokens"] = args.max_tokens
        conversation = Conversation(system=sendable(args.system), pictures=pictures)
        if person:
            ChatSession(client, conversation, options).run()
            return 0
        question = sendable(_read_stdin() if args.question is None else args.question).strip()
        if not question:
            raise ChatError("There is no question: give it as an argument or on standard input.")
        shown = show_answer(client, conversation.ask(question), options)
    return INTERRUPTED if shown.stopped else 0


def _read_stdin() -> str:
    if sys.stdin.isatty():
        print("Type the question, then Ctrl-D on a line of its own.", file=sys.stderr)
    try:
        return sys.stdin.read()
    except UnicodeDecodeError:
        raise ChatError("Standard input is not UTF-8 text.") from None


def _target(args: argparse.Namespace) -> tuple[str, str | None]:
    """Address and key. Without --url both come from the server's own environment variables, so that a shell that can
    start the server can also talk to it; a key from there never goes to an address typed by hand."""
    if args.url is not None:
        return args.url, args.api_key
    server = settings.load({})
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(server.host, server.host)
    host = f"[{host}]" if ":" in host else host
    return f"http://{host}:{server.port}/v1", args.api_key or (server.api_key[0] if server.api_key else None)
