"""What may be written to a person's terminal, and how. Knows nothing of chat, HTTP or models."""

import os
import re
import shutil
import sys

# Control characters of both ranges, and the explicit bidirectional controls, which can make shown text differ from
# the text itself.
_SUSPECT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def clean(text: str) -> str:
    """``text`` without anything that could steer a terminal: escape and control characters (newline and tab stay).

    A lone surrogate, which no encoding can write, becomes U+FFFD.
    """
    return _SUSPECT.sub(lambda match: "\ufffd" if "\ud800" <= match[0] <= "\udfff" else "", text)


def one_line(text: str) -> str:
    """``text`` cleaned and on a single line, for names and messages inside a sentence."""
    return " ".join(clean(text).split())


def sendable(text: str) -> str:
    """``text`` as typed, but for bytes that were no UTF-8 and can't be sent: they become U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def complain(sentence: str) -> None:
    """An error sentence to standard error."""
    sys.stdout.flush()
    print(f"error: {sentence}", file=sys.stderr, flush=True)


def own_command() -> str:
    """What to type to run this program again: ``sightline`` where that is found, else the path it was started by."""
    started_as = sys.argv[0]
    if os.path.basename(started_as) != "sightline" or shutil.which("sightline") == os.path.abspath(started_as):
        return "sightline"
    return min(started_as, os.path.relpath(started_as), key=len)


def size(number: int) -> str:
    """Bytes for people: ``13.1 GiB``, ``7.6 MiB``, ``18 KiB``."""
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if number >= unit:
            value = number / unit
            return f"{value:.0f} {name}" if value >= 100 or value == round(value) else f"{value:.1f} {name}"
    return f"{number} bytes"


def discard_stdout() -> None:
    """After a reader such as ``head`` left: nothing more can be written, and the exit must not complain about it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
