"""What a server's processes hold: memory, descriptors, children. Knows processes, not what they serve."""

import contextlib
from dataclasses import dataclass

import psutil


@dataclass(frozen=True)
class Holdings:
    """Sums over a process and its descendants."""

    resident: int
    """Bytes, of pages that are this tree's own: shared ones would be counted once a process."""
    descriptors: int
    processes: frozenset[int]
    names: tuple[str, ...]
    """What each process runs, sorted."""


def holdings(pid: int) -> Holdings:
    """Raises psutil.NoSuchProcess when ``pid`` itself is gone."""
    parent = psutil.Process(pid)
    resident = descriptors = 0
    names = {}
    for process in (parent, *parent.children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
            names[process.pid] = next((part for part in process.cmdline()[1:] if "sightline" in part), process.name())
            resident += process.memory_full_info().uss
            descriptors += process.num_fds()
    return Holdings(resident, descriptors, frozenset(names), tuple(sorted(names.values())))
