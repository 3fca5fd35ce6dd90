"""Which engine of several a request should meet: one that knows its beginning, unless that one has too much to do.

Remembers which beginnings of prompts went where, as hashes of blocks, salted as the engines' own cache is. Knows no
process and no cache: an engine may have dropped what stands here, which costs a computation and nothing else.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence

from sightline_server.engine.blocks import chain_hashes
from sightline_server.engine.types import Request

BLOCK_TOKENS = 64
"""What shares less than this at its beginning isn't worth bringing together."""
REMEMBERED = 2**16
"""Blocks, of all engines together: a few million tokens, and less than 20 MiB."""
SLACK = 2
"""Requests that an engine may have more than the least busy one and still be preferred for what it knows..."""
SLACK_SHARE = 4
"""...and one more for each so many that the least busy one has."""


class PrefixMemory:
    """The leading blocks of prompts that each engine was given, those met least recently forgotten first."""

    def __init__(self, num_engines: int, *, capacity: int = REMEMBERED) -> None:
        self._num_engines = num_engines
        self._capacity = capacity
        # A bit for each engine.
        self._engines_of: OrderedDict[bytes, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._engines_of)

    def known(self, hashes: Sequence[bytes]) -> list[int]:
        """By engine, how many leading blocks of a prompt it was given before."""
        known = [0] * self._num_engines
        knowing = (1 << self._num_engines) - 1
        for depth, name in enumerate(hashes, start=1):
            knowing &= self._engines_of.get(name, 0)
            if not knowing:
                break
            for engine in range(self._num_engines):
                if knowing >> engine & 1:
                    known[engine] = depth
        return known

    def note(self, hashes: Sequence[bytes], engine: int) -> None:
        """``engine`` is given a prompt that begins so."""
        # The first block last: without it those behind it can't be found, so it has to be forgotten after them.
        for name in reversed(hashes):
            self._engines_of[name] = self._engines_of.pop(name, 0) | 1 << engine
        while len(self._engines_of) > self._capacity:
            self._engines_of.popitem(last=False)

    def forget(self, engine: int) -> None:
        """``engine`` was started anew and knows nothing."""
        others = ~(1 << engine)
        left = ((name, engines & others) for name, engines in self._engines_of.items())
        self._engines_of = OrderedDict((name, engines) for name, engines in left if engines)


def prompt_hashes(request: Request) -> list[bytes]:
    """One for each whole block of the prompt, which tells all before it too: pictures, and whose request it is."""
    hashes: list[bytes] = []
    chain_hashes(request, request.prompt.token_ids, BLOCK_TOKENS, hashes)
    return hashes


def pick(loads: Mapping[int, int], known: Sequence[int], last_given: Sequence[int]) -> int:
    """The engine for a request.

    ``loads``: requests of each engine that can be asked, at least one. ``known``: blocks of the prompt by engine.
    ``last_given``: by engine, a number that grows each time it is given a request; of equals the longest spared wins,
    so that what nobody knows is spread over all caches.
    """
    least = min(loads, key=lambda engine: (loads[engine], -known[engine], last_given[engine]))
    favourite = min(loads, key=lambda engine: (-known[engine], loads[engine], last_given[engine]))
    slack = SLACK + loads[least] // SLACK_SHARE
    follows = known[favourite] > known[least] and loads[favourite] - loads[least] <= slack
    return favourite if follows else least
