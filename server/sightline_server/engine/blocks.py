"""Who owns which cache block, and which blocks hold content worth finding again.

Counts, hashes and block numbers only. Knows no tensor and no policy: the scheduler decides, this keeps the books.
"""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence

from sightline_server.engine.types import ImageSpan, Request


def root_hash(request: Request) -> bytes:
    """What a request's first block is chained to: requests of different tenants share no block."""
    return hashlib.sha256(b"root" + request.cache_salt).digest()


def block_hash(parent: bytes, token_ids: Sequence[int], start: int, images: Iterable[ImageSpan]) -> bytes:
    """Identity of a full block's content: all tokens before it (through ``parent``), its own, and its images.

    ``start`` is the position of the block's first token. Image placeholders share one token id, so each span that
    reaches into the block adds its digest and where in the span the block begins.
    """
    state = hashlib.sha256(parent)
    state.update(array("q", token_ids).tobytes())
    end = start + len(token_ids)
    for span in images:
        if span.start < end and start < span.start + span.length:
            state.update(span.digest)
            state.update((start - span.start).to_bytes(8, "little", signed=True))
    return state.digest()


def chain_hashes(request: Request, token_ids: Sequence[int], block_size: int, known: list[bytes]) -> None:
    """Extend ``known``, the hashes of the leading full blocks of ``token_ids``, to all full blocks."""
    parent = known[-1] if known else root_hash(request)
    for start in range(len(known) * block_size, len(token_ids) - block_size + 1, block_size):
        parent = block_hash(parent, token_ids[start : start + block_size], start, request.prompt.images)
        known.append(parent)


class BlockPool:
    """A fixed number of blocks, reference-counted; freed blocks stay findable until they are handed out again.

    Blocks without users stand in a queue, least recently used first, so that allocation evicts the oldest content.
    """

    def __init__(self, num_blocks: int, *, caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self._caching = caching
        self._users = [0] * num_blocks
        self._hash_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self._idle: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - len(self._idle)

    def find(self, hashes: Sequence[bytes]) -> list[int]:
        """The blocks that hold the longest known beginning of ``hashes``. Takes no reference."""
        found: list[int] = []
        for key in hashes:
            block = self._block_of.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def num_idle_among(self, blocks: Iterable[int]) -> int:
        """How many of ``blocks`` nobody uses now: sharing those costs free blocks, sharing the others doesn't."""
        return sum(block in self._idle for block in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Add a user to each of ``blocks``."""
        for block in blocks:
            self._users[block] += 1
            self._idle.pop(block, None)

    def allocate(self, count: int) -> list[int]:
        """``count`` blocks with one user and no content. The caller has checked ``num_free``."""
        assert count <= len(self._idle), f"asked for {count} blocks, {len(self._idle)} are free"
        taken = []
        for _ in range(count):
            block, _none = self._idle.popitem(last=False)
            self._forget(block)
            self._users[block] = 1
            taken.append(block)
        return taken

    def release(self, blocks: Sequence[int]) -> None:
        """Drop a user from each of ``blocks``; a sequence's last blocks are evicted before its first."""
        for block in reversed(blocks):
            assert self._users[block] > 0, f"block {block} was released without a user"
            self._users[block] -= 1
            if self._users[block] == 0:
                self._idle[block] = None
                if block not in self._hash_of:
                    self._idle.move_to_end(block, last=False)

    def publish(self, block: int, key: bytes) -> None:
        """Make a block whose content is now complete findable. An equal block published before stays the known one."""
        if self._caching and key not in self._block_of and block not in self._hash_of:
            self._hash_of[block] = key
            self._block_of[key] = block

    def forget(self, hashes: Iterable[bytes]) -> None:
        """Make what is known by ``hashes`` unfindable: its content is not what they say. Its users keep it."""
        for key in hashes:
            block = self._block_of.get(key)
            if block is not None:
                self._forget(block)
                if block in self._idle:
                    self._idle.move_to_end(block, last=False)

    def check(self, held: Iterable[Sequence[int]]) -> None:
        """Assert that the books equal ``held``, the blocks of every live sequence."""
        users = [0] * self.num_blocks
        for blocks in held:
            for block in blocks:
                users[block] += 1
        assert users == self._users, f"users by sequence {users} differ from the books {self._users}"
        idle = {block for block, count in enumerate(users) if count == 0}
        assert idle == set(self._idle), f"blocks without users {idle} differ from the queue {set(self._idle)}"
        assert self._block_of == {key: block for block, key in self._hash_of.items()}

    def _forget(self, block: int) -> None:
        key = self._hash_of.pop(block, None)
        if key is not None:
            del self._block_of[key]
