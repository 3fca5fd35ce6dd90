"""Which requests may have crashed the engine, and which one did: those are known by their content and not tried again.

Knows requests, counts and the clock it is given. Knows no process, and doesn't decide when a request is tried.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Collection
from dataclasses import dataclass

import msgspec

from sightline_server.engine.types import Request

MEMORY_S = 600.0
"""For how long after its last crash a request is remembered."""
MEMORY_ENTRIES = 1024
ALONE_AFTER = 3
"""Crashes after which a request is tried with nothing beside it."""


def fingerprint(request: Request) -> bytes:
    """32 bytes, equal for requests that ask for the same computation: prompt, pictures, parameters and tenant, but
    neither seed nor choice, which a client that tries again may not have in its hands."""
    sampling = msgspec.structs.replace(request.sampling, seed=0, choice=0, logit_bias={})
    # Keys that are numbers are not put in order by msgspec.
    bias = sorted(request.sampling.logit_bias.items())
    parts = (request.prompt, sampling, bias, request.cache_salt)
    return hashlib.sha256(msgspec.msgpack.encode(parts)).digest()


@dataclass(frozen=True)
class _Record:
    crashes: int
    guilty: bool
    last: float


class Suspects:
    """Crashes by fingerprint. What was in two, and alone in the last one, is guilty until ``MEMORY_S`` have passed: of
    two that were there, either may be why."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """``clock`` gives seconds and never goes back."""
        self._clock = clock
        self._records: OrderedDict[bytes, _Record] = OrderedDict()

    def __bool__(self) -> bool:
        """Whether any is remembered."""
        # The oldest stand first.
        while self._records and self._clock() - next(iter(self._records.values())).last > MEMORY_S:
            self._records.popitem(last=False)
        return bool(self._records)

    def note_crash(self, there: Collection[bytes], tried: Collection[bytes] = ()) -> None:
        """The engine died while it had the requests ``there``. Those of them that were ``tried`` for an earlier crash
        are the likeliest, and count as having been in enough to be tried alone."""
        prints = set(there)
        for print_ in prints:
            before = self._record(print_)
            crashes = 1 if before is None else before.crashes + 1
            guilty = (len(prints) == 1 and crashes > 1) or (before is not None and before.guilty)
            if print_ in tried:
                crashes = max(crashes, ALONE_AFTER)
            self._records[print_] = _Record(crashes, guilty, self._clock())
            self._records.move_to_end(print_)
        while len(self._records) > MEMORY_ENTRIES:
            self._records.popitem(last=False)

    def clear(self, print_: bytes) -> None:
        """A request of this content ended as it should."""
        self._records.pop(print_, None)

    def crashes(self, print_: bytes) -> int:
        record = self._record(print_)
        return 0 if record is None else record.crashes

    def is_guilty(self, print_: bytes) -> bool:
        record = self._record(print_)
        return record is not None and record.guilty

    def _record(self, print_: bytes) -> _Record | None:
        record = self._records.get(print_)
        if record is not None and self._clock() - record.last > MEMORY_S:
            del self._records[print_]
            return None
        return record
