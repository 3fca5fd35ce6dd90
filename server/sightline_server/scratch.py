"""Folders in the system's temporary directory that live no longer than the process that made them.

Each is locked while its maker lives. A maker that was killed leaves its folder behind, unlocked, and the next server
of the same user removes it. Knows folders and locks, and not what is in them.
"""

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

PURPOSES = ("sockets", "random", "compiled")
# Between a folder's making and its locking there is a moment in which it looks abandoned.
LEAST_AGE_S = 60.0


class ScratchFolder:
    """An empty folder that only this user can enter. Raises OSError when it can't be made."""

    def __init__(self, purpose: Literal["sockets", "random", "compiled"]) -> None:
        self.path = Path(tempfile.mkdtemp(prefix=f"sightline-{purpose}-"))
        self._lock = -1
        try:
            self._lock = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(self._lock, fcntl.LOCK_SH)
        except OSError:
            self.remove()
            raise

    def remove(self) -> None:
        """May be called twice; the second time, the name may be somebody else's and is left alone."""
        path, lock, self._lock = self.path, self._lock, -2
        if lock == -2:
            return
        shutil.rmtree(path, ignore_errors=True)
        if lock >= 0:
            os.close(lock)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()


def sweep() -> list[Path]:
    """Removes folders whose makers are gone, and returns them. What can't be told for sure is left alone."""
    removed = []
    # File times are set by this clock and no other.
    now = time.time()
    for path in _candidates():
        with contextlib.suppress(OSError):
            seen = path.lstat()
            private = stat.S_ISDIR(seen.st_mode) and stat.S_IMODE(seen.st_mode) == 0o700
            if not private or seen.st_uid != os.geteuid() or now - seen.st_mtime < LEAST_AGE_S:
                continue
            folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                # Fails while the maker lives, in whatever container.
                fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
                removed.append(path)
            finally:
                os.close(folder)
    return removed


def _candidates() -> Iterator[Path]:
    with contextlib.suppress(OSError):
        base = Path(tempfile.gettempdir())
        for purpose in PURPOSES:
            yield from base.glob(f"sightline-{purpose}-*")
