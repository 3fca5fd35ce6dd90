"""How many CPU threads a step gets: one if it is short, else whichever choice has lately been fastest for its size.

Threads that meet at every operation wait for the slowest of them. On free cores two are faster than one, unless
there is little between two meetings; beside a busy process, which may come and go, they can be several times slower.
Only time tells, so time is what this looks at. Knows rows and seconds. Knows nothing of torch or of what a step does.
"""

from collections import defaultdict, deque
from statistics import median

SHORT_S = 0.002
"""A step that takes one thread less isn't shared: its operations are over before a second thread is there."""
PROBE_EVERY = 16
"""Steps of a size between two tries of the choice that was slower; twice as many each time it is slower again."""
PROBE_SELDOM = 512
"""But no more than this."""
_REMEMBERED = 5


class _Size:
    """What steps of one size have cost, a row, by threads."""

    def __init__(self) -> None:
        self.costs: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))
        self.fastest = 0
        self.patience = PROBE_EVERY
        self.steps_to_probe = PROBE_EVERY


class ThreadChooser:
    """Ask ``choose`` before a step, tell ``took`` after it. Steps are alike when their rows have as many bits."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._sizes: defaultdict[int, _Size] = defaultdict(_Size)

    def choose(self, rows: int) -> int:
        """Threads for a step of ``rows`` rows."""
        if self.most == 1:
            return 1
        size = self._sizes[rows.bit_length()]
        one, most = size.costs[1], size.costs[self.most]
        if len(one) < _REMEMBERED or median(one) * rows < SHORT_S:
            return 1
        if len(most) < _REMEMBERED:
            return self.most
        fastest, other = (1, self.most) if median(one) <= median(most) else (self.most, 1)
        if fastest != size.fastest:
            size.fastest, size.patience = fastest, PROBE_EVERY
        size.steps_to_probe -= 1
        if size.steps_to_probe > 0:
            return fastest
        size.steps_to_probe = size.patience
        size.patience = min(2 * size.patience, PROBE_SELDOM)
        return other

    def took(self, rows: int, threads: int, seconds: float) -> None:
        """A step of ``rows`` rows took ``seconds`` with ``threads``."""
        self._sizes[rows.bit_length()].costs[threads].append(seconds / rows)
