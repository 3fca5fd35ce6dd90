"""The `sightline` command: finds the subcommand, imports that one alone, and turns its outcome into an exit status.

Knows the names of the subcommands. Knows nothing of what they do.
"""

import argparse
import importlib
import sys
from collections.abc import Sequence
from importlib.metadata import version
from typing import NoReturn

from sightline_server.cli.terminal import complain

COMMANDS = {
    "serve": "serve a model over HTTP",
    "chat": "ask a running server, with pictures",
    "keys": "make, list and revoke keys with scopes and limits",
    "bench": "measure an OpenAI-compatible server",
    "doctor": "say what this machine can serve, and what is missing",
}


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose complaints are one sentence that ends in the way out."""

    def error(self, message: str) -> NoReturn:
        complain(f"{message[:1].upper()}{message[1:].rstrip('.')}. Run '{self.prog} --help' for help.")
        raise SystemExit(2)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status. Raises SystemExit for ``--help`` and bad arguments."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = Parser(
        prog="sightline",
        description="A private, OpenAI-compatible server for vision-language models.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"sightline {version('sightline')}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = next((argument for argument in argv if not argument.startswith("-")), None)
    for name, summary in COMMANDS.items():
        # The others are named for --help only: importing them all would make each of them slow.
        if name == command:
            module = importlib.import_module(f"sightline_server.cli.{name}")
            module.add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    arguments = parser.parse_args(argv)
    try:
        status: int = module.run(arguments)
    except KeyboardInterrupt:
        status = 130
    return status


if __name__ == "__main__":
    sys.exit(main())
