"""Line editing at the prompt: history in memory, and Tab for commands and paths. Knows only readline."""

import glob
import os
from collections.abc import Sequence

try:
    import readline
except ImportError:  # Python can be built without it; then lines are read plainly.
    readline = None  # type: ignore[assignment]


def prepare(commands: Sequence[str]) -> None:
    """Make ``input()`` keep a history and complete ``commands`` at the start of a line, paths elsewhere."""
    if readline is None:
        return

    def complete(word: str, index: int) -> str | None:
        at_start = readline.get_begidx() == 0
        found = [f"{name} " for name in commands if name.startswith(word)] if at_start and word.startswith("/") else []
        found += matching_paths(word)
        return found[index] if index < len(found) else None

    readline.set_completer(complete)
    readline.set_completer_delims(" \t\n")
    readline.parse_and_bind("tab: complete")


def matching_paths(word: str) -> list[str]:
    """Paths that begin with ``word``, sorted; folders end in a slash."""
    found = sorted(glob.glob(glob.escape(os.path.expanduser(word)) + "*"))
    return [f"{path}/" if os.path.isdir(path) else path for path in found]
