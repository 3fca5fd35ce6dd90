"""Encoder outputs kept for reuse, least recently used first out, bounded in bytes.

An entry in use by a prompt being computed is pinned and outlives the bound. Knows sizes and keys; what an entry
holds is the runner's business.
"""

from collections import OrderedDict
from typing import Generic, Protocol, TypeVar


class Sized(Protocol):
    @property
    def nbytes(self) -> int: ...


T = TypeVar("T", bound=Sized)


class VisionCache(Generic[T]):
    """Maps an image's key (tenant salt and pixel digest) to its encoder output."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes
        self._entries: OrderedDict[bytes, T] = OrderedDict()
        self._pins: dict[bytes, int] = {}
        self._bytes = 0

    def __contains__(self, key: bytes) -> bool:
        return key in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def num_pinned(self) -> int:
        return len(self._pins)

    def get(self, key: bytes) -> T:
        self._entries.move_to_end(key)
        return self._entries[key]

    def put(self, key: bytes, entry: T) -> None:
        if key not in self._entries:
            self._entries[key] = entry
            self._bytes += entry.nbytes
        self._evict()

    def forget(self, key: bytes) -> None:
        """Drop ``key``, pinned or not: its entry is not to be used."""
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._bytes -= entry.nbytes

    def pin(self, key: bytes) -> None:
        """Keep ``key``, present or about to be put, until as many ``unpin`` calls have come."""
        self._pins[key] = self._pins.get(key, 0) + 1

    def unpin(self, key: bytes) -> None:
        assert self._pins.get(key, 0) > 0, "an image was unpinned more often than pinned"
        self._pins[key] -= 1
        if self._pins[key] == 0:
            del self._pins[key]
            self._evict()

    def _evict(self) -> None:
        if self._bytes <= self.capacity_bytes:
            return
        for key in [key for key in self._entries if key not in self._pins]:
            self._bytes -= self._entries.pop(key).nbytes
            if self._bytes <= self.capacity_bytes:
                return
