"""`sightline keys`: makes, lists and revokes the keys in a keys file.

Works on the file alone and speaks to no server; a running one reads it again on SIGHUP. A key is shown once, when it
is made, and is never an argument, which other users of the machine could read.
"""

import argparse
import os
import sys
from pathlib import Path

import msgspec

from sightline_server import settings as settings_table
from sightline_server.auth.keys_file import LARGEST_LIMIT, KeyEntry, create_key, read_keys_file, revoke_key
from sightline_server.auth.principal import Limits, Scope
from sightline_server.cli.terminal import complain, discard_stdout
from sightline_server.settings import SettingsError

DESCRIPTION = """\
Make, list and revoke keys with scopes and limits. They stand in a file, hashed, that 'sightline serve --keys-file FILE'
reads at its start and again on SIGHUP: kill -HUP PID.
"""
_COUNTS = {
    "requests_per_minute": "requests it may send in a minute",
    "tokens_per_minute": "tokens of prompts and answers in a minute",
    "images_per_minute": "pictures in a minute",
    "max_concurrent": "requests that may be answered at one time",
}


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    parser = subparsers.add_parser(
        "keys", help="make, list and revoke keys with scopes and limits", description=DESCRIPTION, allow_abbrev=False
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", dest="action", required=True)

    create = actions.add_parser("create", help="make a key and print it, once", allow_abbrev=False)
    create.add_argument("name", metavar="NAME", help="whom or what it is for, such as ann or nightly-batch")
    create.add_argument(
        "--scope",
        action="append",
        choices=[scope.value for scope in Scope],
        metavar="{" + ",".join(Scope) + "}",
        help="what it opens; may be given several times (default: chat)",
    )
    for name, text in _COUNTS.items():
        create.add_argument(f"--{name.replace('_', '-')}", type=_count, metavar="N", help=f"most {text}")
    create.add_argument(
        "--megapixels-per-minute", type=_amount, metavar="N", help="most megapixels of pictures in a minute"
    )

    listing = actions.add_parser(
        "list", help="show the keys there are, without what opens the door", allow_abbrev=False
    )
    revoke = actions.add_parser("revoke", help="end a key", allow_abbrev=False)
    revoke.add_argument("key", metavar="KEY_ID", help="its id, or the name of one in force; never the key itself")
    for action in (create, listing, revoke):
        action.add_argument("--keys-file", metavar="FILE", help="the file (default: SIGHTLINE_KEYS_FILE)")


def run(args: argparse.Namespace) -> int:
    """Exit status: 0, or 2 for what can't be done."""
    try:
        path = _keys_file(args.keys_file)
        match args.action:
            case "create":
                _create(path, args)
            case "list":
                _list(path)
            case "revoke":
                _revoke(path, args.key)
    except SettingsError as error:
        complain(str(error))
        return 2
    except BrokenPipeError:
        discard_stdout()
        return 1
    return 0


def _keys_file(given: str | None) -> Path:
    name = given or settings_table.load({}).keys_file
    if not name:
        raise SettingsError("Say which file holds the keys: give --keys-file FILE or set SIGHTLINE_KEYS_FILE.")
    return Path(os.path.expanduser(name))


def _create(path: Path, args: argparse.Namespace) -> None:
    values = {name: getattr(args, name) for name in (*_COUNTS, "megapixels_per_minute")}
    scopes = tuple(dict.fromkeys(Scope(scope) for scope in args.scope or [Scope.CHAT]))
    entry, secret = create_key(path, args.name, scopes, Limits(**values))
    # The key alone goes to standard output, so that it can be piped to where it belongs.
    print(f"Made {entry.id} ({entry.name}) in {path}. This is the only time the key is shown:", file=sys.stderr)
    print(secret, flush=True)
    print("A running server takes it up on SIGHUP: kill -HUP PID.", file=sys.stderr)


def _list(path: Path) -> None:
    rows = [("id", "name", "scopes", "limits", "created", "state"), *(_row(entry) for entry in read_keys_file(path))]
    if len(rows) == 1:
        print(f"There is no key in {path} yet. 'sightline keys create NAME' makes one.", file=sys.stderr)
        return
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _row(entry: KeyEntry) -> tuple[str, ...]:
    limits = [
        f"{name.replace('_per_minute', '/min').replace('max_', '')} {value:g}"
        for name, value in msgspec.structs.asdict(entry.limits).items()
        if value is not None
    ]
    state = f"revoked {entry.revoked}" if entry.revoked else "in force"
    return entry.id, entry.name, ",".join(entry.scopes), ", ".join(limits) or "none", entry.created, state


def _revoke(path: Path, which: str) -> None:
    entry = revoke_key(path, which)
    print(f"Revoked {entry.id} ({entry.name}). A running server lets it go on SIGHUP: kill -HUP PID.")


def _count(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) <= LARGEST_LIMIT:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _amount(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= LARGEST_LIMIT:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value
