"""The waiting line: classes one after the other, tenants in turn within one, a tenant's requests as they came.

The turn is that of the tenant for whom the fewest tokens were computed. Whoever comes back after a pause begins where
the least served of those who stayed is: nobody saves up, and nobody pays for hours when the machine was free.
Knows tenants and counts of tokens. Knows no block, no budget and no clock.
"""

import heapq
from bisect import insort
from collections import Counter
from collections.abc import Iterator

from sightline_server.engine.types import Sequence


class FairLine:
    """Iterating gives the waiting sequences in the order in which they should be admitted now."""

    def __init__(self) -> None:
        self._lines: dict[tuple[int, str], list[Sequence]] = {}
        self._live: Counter[str] = Counter()
        self.num_new = 0
        """Those of them that have had no turn yet. The others are begun requests that were put back."""
        self._served: dict[str, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lines.values()))

    def __iter__(self) -> Iterator[Sequence]:
        lines = {key: list(line) for key, line in self._lines.items()}
        for priority in sorted({priority for priority, _ in lines}):
            yield from self._take_turns({tenant: line for (rank, tenant), line in lines.items() if rank == priority})

    def join(self, sequence: Sequence) -> None:
        """A new request takes its place."""
        tenant = sequence.request.tenant
        if not self._live:
            self._served.clear()
        if tenant not in self._live:
            least = min((self._served[other] for other in self._live), default=0)
            self._served[tenant] = max(least, self._served.get(tenant, 0))
        self._live[tenant] += 1
        self.rejoin(sequence)

    def rejoin(self, sequence: Sequence) -> None:
        """A preempted one comes back to the place it had."""
        line = self._lines.setdefault(_line_of(sequence), [])
        insort(line, sequence, key=lambda other: other.order)
        self.num_new += _is_new(sequence)

    def leave(self, sequence: Sequence) -> None:
        """It waits no more."""
        key = _line_of(sequence)
        self._lines[key].remove(sequence)
        self.num_new -= _is_new(sequence)
        if not self._lines[key]:
            del self._lines[key]

    def end(self, sequence: Sequence) -> None:
        """It lives no more, and has left the line before."""
        tenant = sequence.request.tenant
        self._live[tenant] -= 1
        if not self._live[tenant]:
            del self._live[tenant]

    def charge(self, sequence: Sequence, num_tokens: int) -> None:
        """So many tokens were computed for it."""
        if sequence.request.tenant in self._live:
            self._served[sequence.request.tenant] += num_tokens

    def _take_turns(self, lines: dict[str, list[Sequence]]) -> Iterator[Sequence]:
        turns = []
        for tenant, line in lines.items():
            coming = iter(line)
            turns.append((*_rank(first := next(coming), self._served[tenant]), tenant, first, coming))
        heapq.heapify(turns)
        while turns:
            _, served, _, tenant, sequence, coming = turns[0]
            yield sequence
            following = next(coming, None)
            if following is None:
                heapq.heappop(turns)
            else:
                # As if what was just given were admitted: else one tenant's whole line would stand in front.
                served += len(sequence.token_ids)
                heapq.heapreplace(turns, (*_rank(following, served), tenant, following, coming))


def _line_of(sequence: Sequence) -> tuple[int, str]:
    return sequence.request.priority, sequence.request.tenant


def _rank(sequence: Sequence, served: int) -> tuple[bool, int, int]:
    # What was begun is finished before another tenant's request takes its room.
    return _is_new(sequence), served, sequence.order


def _is_new(sequence: Sequence) -> bool:
    return sequence.num_hit_tokens < 0
