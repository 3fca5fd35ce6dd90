"""Whether a tracer such as ``scripts/no_egress`` follows these tests: all stops are its own then, all calls slow."""

from pathlib import Path

import pytest

_STATUS = Path("/proc/self/status")
IS_TRACED = _STATUS.exists() and "TracerPid:\t0\n" not in _STATUS.read_text()
needs_stops = pytest.mark.skipif(IS_TRACED, reason="under a tracer a process that a signal stopped looks traced.")
