"""The keys file: one key a line, each a JSON object that holds the key's hash and never the key.

A person may edit it, and `sightline keys` rewrites single lines of it, leaving the others as they stand, comments and
empty lines included. Knows lines, modes and locks. Knows no HTTP and no request.

A key is 256 random bits, so its plain SHA-256 can't be guessed at; a slow hash with a salt is for passwords, which
people choose.
"""

import contextlib
import fcntl
import hashlib
import os
import re
import secrets
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from sightline_server.auth.principal import Limits, Scope
from sightline_server.settings import SettingsError

KEY_PREFIX = "sk-sightline-"
MAX_NAME = 64
LARGEST_LIMIT = 10**12
_ID = re.compile(r"key_[0-9a-f]{32}")
_HASH = re.compile(r"[0-9a-f]{64}")


class KeysFileError(SettingsError):
    """The keys file, or what is asked of it, can't be used; the sentence says which line and what would do."""


class KeyEntry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One line of the file."""

    id: str
    """``key_`` and 128 random bits."""
    name: str
    sha256: str
    """Of the key, in hex."""
    scopes: tuple[Scope, ...]
    limits: Limits = Limits()
    created: str
    """ISO 8601, for people only."""
    revoked: str = ""
    """When it was revoked; anything but an empty text ends it."""


def read_keys_file(path: Path) -> tuple[KeyEntry, ...]:
    """All entries, revoked ones too. Raises KeysFileError."""
    return tuple(entry for _, entry in _entries(path, _read_lines(path)))


def create_key(path: Path, name: str, scopes: tuple[Scope, ...], limits: Limits) -> tuple[KeyEntry, str]:
    """Append a new key; the file is made if there is none. Returns its entry and the key, which is kept nowhere.

    Raises KeysFileError.
    """
    secret = KEY_PREFIX + secrets.token_urlsafe(32)
    entry = KeyEntry(
        id=f"key_{secrets.token_hex(16)}",
        name=name,
        sha256=digest_of(secret).hex(),
        scopes=scopes,
        limits=limits,
        created=_now(),
    )
    _check(entry, "The new key")
    with _locked(path) as lines:
        for _, known in _entries(path, lines):
            if known.name == name and not known.revoked:
                raise KeysFileError(f"There is a key named {name!r} already. Revoke it first, or give another name.")
        if lines and not lines[-1].endswith("\n"):
            lines[-1] += "\n"
        lines.append(_line(entry))
    return entry, secret


def revoke_key(path: Path, which: str) -> KeyEntry:
    """Mark the key with this id or name as revoked. Raises KeysFileError."""
    if which.startswith(KEY_PREFIX):
        # It isn't repeated here: what was typed may be on record already, but this may go elsewhere.
        raise KeysFileError("That is a key. Give its id or its name, which 'sightline keys list' shows.")
    with _locked(path) as lines:
        entries = _entries(path, lines)
        found = [(row, entry) for row, entry in entries if which in (entry.id, entry.name)]
        live = [(row, entry) for row, entry in found if not entry.revoked]
        if not found:
            raise KeysFileError(f"There is no key {which!r}. 'sightline keys list' shows those there are.")
        if not live:
            raise KeysFileError(f"The key {which!r} was revoked already, at {found[-1][1].revoked}.")
        row, entry = live[0]
        entry = msgspec.structs.replace(entry, revoked=_now())
        lines[row] = _line(entry)
    return entry


def digest_of(secret: str) -> bytes:
    return hashlib.sha256(secret.encode()).digest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _line(entry: KeyEntry) -> str:
    return msgspec.json.encode(entry).decode() + "\n"


def _read_lines(path: Path) -> list[str]:
    try:
        status = path.stat()
        text = path.read_text("utf-8")
    except FileNotFoundError:
        raise KeysFileError(f"--keys-file {str(path)!r} does not exist. 'sightline keys create' makes it.") from None
    except OSError as error:
        raise KeysFileError(f"--keys-file {str(path)!r} can't be read: {error.strerror}.") from None
    except UnicodeDecodeError:
        raise KeysFileError(f"--keys-file {str(path)!r} is no UTF-8 text. Restore it from a copy.") from None
    if status.st_mode & 0o022:
        # Who can write it can add a key.
        raise KeysFileError(f"--keys-file {str(path)!r} can be written by other users: run chmod 600 on it.")
    return text.splitlines(keepends=True)


def _entries(path: Path, lines: list[str]) -> list[tuple[int, KeyEntry]]:
    """The entries with the index of each one's line."""
    found: list[tuple[int, KeyEntry]] = []
    for row, line in enumerate(lines):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        where = f"Line {row + 1} of --keys-file {str(path)!r}"
        try:
            entry = msgspec.json.decode(line, type=KeyEntry)
        except msgspec.DecodeError as error:
            raise KeysFileError(f"{where} can't be used: {_reason(error)}. Mend or remove it.") from None
        _check(entry, where)
        found.append((row, entry))
    for what in ("id", "sha256"):
        values = [getattr(entry, what) for _, entry in found]
        if len(set(values)) < len(values):
            twice = next(value for value in values if values.count(value) > 1)
            rows = [str(row + 1) for row, entry in found if getattr(entry, what) == twice]
            raise KeysFileError(
                f"Lines {' and '.join(rows)} of --keys-file {str(path)!r} have the same {what}. Remove all but one."
            )
    return found


def _reason(error: msgspec.DecodeError) -> str:
    text = str(error).replace("`", "'").rstrip(".")
    return text[:1].lower() + text[1:]


def _check(entry: KeyEntry, where: str) -> None:
    if not _ID.fullmatch(entry.id):
        raise KeysFileError(f"{where} has no usable id: it is 'key_' and 32 hexadecimal digits.")
    if not _HASH.fullmatch(entry.sha256):
        raise KeysFileError(f"{where} has no usable sha256: it is 64 lower-case hexadecimal digits.")
    if not 0 < len(entry.name) <= MAX_NAME or not entry.name.isprintable() or entry.name != entry.name.strip():
        raise KeysFileError(f"{where} needs a name of 1 to {MAX_NAME} printable characters.")
    if not entry.scopes:
        raise KeysFileError(f"{where} opens nothing: give it one of the scopes {', '.join(Scope)}.")
    for limit, value in msgspec.structs.asdict(entry.limits).items():
        if value is not None and not 0 < value <= LARGEST_LIMIT:
            raise KeysFileError(f"{where} has {limit} {value:g}; a limit is above 0, and leaving it out is no limit.")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[list[str]]:
    """The file's lines, to be changed in place and written when the block ends; other writers wait meanwhile."""
    path = path.resolve()
    try:
        # The file itself is replaced, so its folder is what writers meet at.
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise KeysFileError(f"The folder {str(path.parent)!r} can't be used: {error.strerror}.") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        lines = _read_lines(path) if path.exists() else []
        yield lines
        _replace(path, "".join(lines))
        os.fsync(folder)
    except OSError as error:
        raise KeysFileError(f"{str(path)!r} can't be written and stays as it was: {error.strerror}.") from None
    finally:
        os.close(folder)


def _replace(path: Path, text: str) -> None:
    """Write all of it or nothing, readable by the owner alone."""
    # mkstemp gives mode 0600.
    handle, made = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with contextlib.suppress(FileNotFoundError):
            # An administrator may write for the server's own user.
            before = path.stat()
            os.fchown(handle, before.st_uid, before.st_gid)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(made, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(made)
        raise
