"""Reads the small files of a checkpoint folder that a stranger may have made: within sizes, links and plain JSON.

Knows paths, bytes and JSON, and which keys ask for code. Knows no meaning of any other field; imports the standard
library alone.
"""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

MAX_JSON_BYTES = 10_000_000
"""Of a file with settings: published ones have some ten thousand bytes, the shard index of a large model a million."""
MAX_TOKENIZER_BYTES = 100_000_000
"""Of ``tokenizer.json``: a vocabulary of 260,000 tokens with its merges takes 35 million."""
MAX_TEMPLATE_BYTES = 1_000_000

_CODE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")


class CheckpointError(ValueError):
    """A checkpoint folder that can't be served; the sentence names the file or field, and the fix."""


def find_file(folder: Path, name: str) -> Path | None:
    """``name`` in ``folder``, or None where nothing is there.

    A link may lead to another file of the folder, or to the ``blobs`` that a download cache keeps beside its
    ``snapshots``. Raises CheckpointError for one that leads elsewhere, and for what is no regular file.
    """
    path = folder / name
    if not path.exists():
        return None
    home, real = folder.resolve(), path.resolve()
    if not real.is_file():
        raise CheckpointError(f"{path} is no regular file; put the checkpoint's own file there")
    in_cache = home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"
    if not (real.is_relative_to(home) or in_cache):
        raise CheckpointError(f"{path} is a link that leads out of the checkpoint folder; put a copy of the file there")
    return path


def read_text(path: Path, most: int) -> str:
    """The UTF-8 text of a file of at most ``most`` bytes. Raises CheckpointError for any other."""
    try:
        with path.open("rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            data = b"" if size > most else stream.read(most + 1)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read: {error.strerror}; see to its permissions") from error
    if max(size, len(data)) > most:
        raise CheckpointError(f"{path} has more than {most} bytes, the most that is read of it; fetch the file again")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not UTF-8 text; fetch the file again") from error


def read_object(path: Path, most: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most ``most`` bytes. Raises CheckpointError for whatever else it holds."""
    try:
        values = json.loads(read_text(path, most))
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        why = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise CheckpointError(f"{path} is not valid JSON: {why}; fetch the file again") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not a {type(values).__name__}; fetch the file again")
    return values


def read_settings(path: Path) -> dict[str, Any]:
    """As ``read_object``; raises CheckpointError, too, where any level asks for code of the checkpoint's own."""
    values = read_object(path)
    for place in _asking_for_code(values):
        raise CheckpointError(
            f"{path}: {place}: this checkpoint wants to run code of its own, which is never done; "
            "take a checkpoint whose architecture transformers has built in"
        )
    return values


def _asking_for_code(values: Mapping[str, Any]) -> Iterator[str]:
    waiting: list[tuple[str, Any]] = [("", values)]
    while waiting:
        prefix, value = waiting.pop()
        if isinstance(value, list):
            waiting += [(f"{prefix}{index}.", item) for index, item in enumerate(value)]
        elif isinstance(value, Mapping):
            yield from (f"{prefix}{name}" for name in _CODE_KEYS if value.get(name))
            waiting += [(f"{prefix}{name}.", item) for name, item in value.items()]
