"""Encoder outputs: bounded in bytes, least recently used first out, pinned while in use."""

from dataclasses import dataclass

import pytest

from sightline_server.engine.vision_cache import VisionCache


@dataclass
class Entry:
    nbytes: int


def test_the_least_recently_used_goes_first() -> None:
    cache: VisionCache[Entry] = VisionCache(20)
    cache.put(b"a", Entry(10))
    cache.put(b"b", Entry(10))
    cache.get(b"a")
    cache.put(b"c", Entry(10))
    assert [key in cache for key in (b"a", b"b", b"c")] == [True, False, True]


def test_a_pinned_entry_outlives_the_bound_and_goes_when_unpinned() -> None:
    cache: VisionCache[Entry] = VisionCache(5)
    cache.pin(b"a")
    cache.pin(b"a")
    cache.put(b"a", Entry(10))
    cache.unpin(b"a")
    assert b"a" in cache
    cache.unpin(b"a")
    assert b"a" not in cache
    assert len(cache) == 0
    with pytest.raises(AssertionError, match="more often"):
        cache.unpin(b"a")


def test_putting_a_key_again_counts_its_bytes_once() -> None:
    cache: VisionCache[Entry] = VisionCache(25)
    for _ in range(3):
        cache.put(b"a", Entry(10))
    cache.put(b"b", Entry(10))
    assert b"a" in cache
    assert b"b" in cache
