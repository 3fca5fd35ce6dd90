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
"""Steps of a size between two tries of the choice that was slower."""
_REMEMBERED = 5


class ThreadChooser:
    """Ask ``choose`` before a step, tell ``took`` after it. Steps are alike when their rows have as many bits."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._steps: defaultdict[int, int] = defaultdict(int)
        # (bits of the row count, threads) -> seconds a row of the latest steps.
        self._costs: defaultdict[tuple[int, int], deque[float]] = defaultdict(lambda: deque(maxlen=_REMEMBERED))

    def choose(self, rows: int) -> int:
        """Threads for a step of ``rows`` rows."""
        if self.most == 1 or rows < FEW_ROWS:
            return 1
        size = rows.bit_length()
        self._steps[size] += 1
        one, most = self._costs[size, 1], self._costs[size, self.most]
        if min(len(one), len(most)) < _REMEMBERED:
            return 1 if len(one) < len(most) else self.most
        fastest, other = (1, self.most) if median(one) < median(most) else (self.most, 1)
        return other if self._steps[size] % PROBE_EVERY == 0 else fastest

    def took(self, rows: int, threads: int, seconds: float) -> None:
        """A step of ``rows`` rows took ``seconds`` with ``threads``."""
        self._costs[rows.bit_length(), threads].append(seconds / rows)
