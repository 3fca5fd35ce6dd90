"""What a container or service manager lets this process use, read from Linux control groups, both versions.

Knows the files of cgroup v1 and v2. A machine without them has no limits to report.
"""

from collections.abc import Iterator
from pathlib import Path

import psutil

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_NO_LIMIT_BYTES = 2**60
"""Version 1 writes "no limit" as a number near 2**63."""


def cpu_quota(root: Path = _CGROUP_ROOT, own: Path = _OWN_CGROUP) -> float | None:
    """CPUs' worth of time this process may take, such as 1.5, or None without a limit."""
    quotas = []
    for folder in _folders("cpu", root, own):
        words = _words(folder / "cpu.max") or _words(folder / "cpu.cfs_quota_us") + _words(folder / "cpu.cfs_period_us")
        if len(words) == 2 and words[0].isdecimal() and int(words[1]) > 0:
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def memory_left(root: Path = _CGROUP_ROOT, own: Path = _OWN_CGROUP) -> int | None:
    """Bytes until the memory limit, file cache counted as free, or None without a limit."""
    left = []
    for folder in _folders("memory", root, own):
        limit = _number(folder / "memory.max") or _number(folder / "memory.limit_in_bytes")
        used = _number(folder / "memory.current") or _number(folder / "memory.usage_in_bytes")
        if limit and used is not None and limit < _NO_LIMIT_BYTES:
            left.append(max(0, limit - used + _reclaimable(folder)))
    return min(left, default=None)


def memory_free() -> int:
    """Bytes that this process may still take: what the machine has left, or less under a limit."""
    left, available = memory_left(), int(psutil.virtual_memory().available)
    return available if left is None else min(left, available)


def _folders(controller: str, root: Path, own: Path) -> Iterator[Path]:
    """This process's group and those above it: each may limit. Inside a container only the root may be mounted."""
    for line in _text(own).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "" or controller in controllers.split(","):
            top = root / controller if controllers else root
            group = top / path.lstrip("/")
            while group != top and top in group.parents:
                yield group
                group = group.parent
            yield top


def _reclaimable(folder: Path) -> int:
    for line in _text(folder / "memory.stat").splitlines():
        name, _, value = line.partition(" ")
        if name in ("inactive_file", "total_inactive_file"):
            return int(value)
    return 0


def _number(path: Path) -> int | None:
    words = _words(path)
    return int(words[0]) if words and words[0].isdecimal() else None


def _words(path: Path) -> list[str]:
    return _text(path).split()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
