"""How a program that is given strangers' files is started, how it confines itself, and whether it was stopped.

Knows processes, limits and the header of a job. Knows no pictures and no templates; imports the standard library alone.
"""

import ctypes
import os
import resource
import signal
import struct
import sys
from pathlib import Path

JOB = struct.Struct("<Q")
"""Length of what follows."""

_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_PR_SET_PDEATHSIG = 1
_PR_SET_NO_NEW_PRIVS = 38


def command(module: str, options: str) -> tuple[str, ...]:
    """What starts ``module`` as a program with one argument."""
    return (sys.executable, "-S", "-P", "-m", module, options)


def environment() -> dict[str, str]:
    """All that the program gets: no secret of the server is in reach of a hostile file."""
    return {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), **_ONE_THREAD}


def confine(*, parent: int, memory_mb: int) -> None:
    """For the program's first line: from here it ends with ``parent``, holds no file but the standard ones, has at
    most ``memory_mb`` MiB of address space, and makes no file, no core dump and no privileged process."""
    # uvloop lets a new process inherit the pipes of its siblings, whose end would then go unnoticed.
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    # They reach every process of a terminal or a service; the server decides when its workers end.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        library.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        library.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    if os.getppid() != parent:
        # It ended before the lines above took effect.
        sys.exit(1)
    limit = memory_mb << 20
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def silence() -> None:
    """Libraries print their complaints about a file; errors of the program's own start have been shown by now."""
    with open(os.devnull, "wb") as nowhere:
        os.dup2(nowhere.fileno(), sys.stderr.fileno())


def limit_cpu(seconds: float) -> None:
    """At most ``seconds`` of processor time from now on; beyond, the kernel ends this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    soft = int(used.ru_utime + used.ru_stime + seconds) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (soft, resource.RLIM_INFINITY))


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped the process; False where the system doesn't say. A debugger's stop is none."""
    try:
        # The name before the state may hold anything but ends with the last parenthesis.
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] == b"T"
    except (OSError, IndexError):
        return False
