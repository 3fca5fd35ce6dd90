"""How many CPU threads a step gets: one for few rows, for many rows whichever choice has lately been fastest.

Threads that meet at every operation wait for the slowest of them. On free cores two are faster than one;
beside a busy process, which may come and go, they can be several times slower. Only time tells, so time is what this
looks at. Knows rows and seconds. Knows nothing of torch or of what a step computes.
"""

from collections import defaultdict, deque
from statistics import median

FEW_ROWS = 8
"""Steps of fewer rows are too short to share: they leave the other cores to the HTTP side and to image decoding."""
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
        if self.most == 1 or rows < FEW_ROWS:
            return 1
        size = self._sizes[rows.bit_length()]
        one, most = size.costs[1], size.costs[self.most]
        if min(len(one), len(most)) < _REMEMBERED:
            return 1 if len(one) <= len(most) else self.most
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
