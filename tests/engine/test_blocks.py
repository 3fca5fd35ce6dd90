"""The block books: sharing, eviction order, identity of content."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sightline_server.engine.blocks import BlockPool, block_hash, chain_hashes
from sightline_server.engine.types import ImageSpan, Prompt, Request, SamplingParams


def make_request(
    token_ids: tuple[int, ...] = (1, 2, 3), *, salt: bytes = b"", images: tuple[ImageSpan, ...] = ()
) -> Request:
    return Request(id="r", prompt=Prompt(token_ids, images), sampling=SamplingParams(max_tokens=1), cache_salt=salt)


def hashes(request: Request, size: int = 4) -> list[bytes]:
    known: list[bytes] = []
    chain_hashes(request, request.prompt.token_ids, size, known)
    return known


def test_only_full_blocks_have_a_hash_and_the_chain_grows_in_place() -> None:
    request = make_request(tuple(range(11)))
    known = hashes(request)
    assert len(known) == 2
    chain_hashes(request, tuple(range(16)), 4, known)
    assert known == hashes(make_request(tuple(range(16))))


def test_a_block_is_known_by_all_that_stands_before_it() -> None:
    left, right = hashes(make_request((1, 2, 3, 4, 5, 6, 7, 8))), hashes(make_request((9, 2, 3, 4, 5, 6, 7, 8)))
    assert left[1] != right[1]


def test_tenants_share_no_block() -> None:
    assert not set(hashes(make_request((1,) * 8, salt=b"a"))) & set(hashes(make_request((1,) * 8, salt=b"b")))


def test_images_and_their_place_tell_blocks_apart() -> None:
    tokens = (5,) * 12

    def of(*spans: tuple[int, int, bytes]) -> list[bytes]:
        return hashes(make_request(tokens, images=tuple(ImageSpan(*span) for span in spans)))

    cat, dog = b"c" * 32, b"d" * 32
    assert of((0, 8, cat))[0] != of((0, 8, dog))[0]
    assert of((0, 8, cat)) != of((1, 8, cat))
    assert of((0, 4, cat), (4, 4, dog)) != of((0, 4, dog), (4, 4, cat))
    # The second block of one long image isn't the second of two short ones.
    assert of((0, 8, cat))[1] != of((0, 4, cat), (4, 4, cat))[1]
    # An image that begins after a block doesn't change it.
    assert of((8, 4, cat))[:2] == of((8, 4, dog))[:2]


def test_block_hash_takes_the_offset_within_an_image() -> None:
    span = (ImageSpan(0, 100, b"x" * 32),)
    assert block_hash(b"p", (7,) * 4, 4, span) != block_hash(b"p", (7,) * 4, 8, span)


def test_freed_content_is_found_until_its_block_is_handed_out() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for block, key in zip(blocks, (b"a", b"b", b"c"), strict=True):
        pool.publish(block, key)
    pool.release(blocks)
    assert pool.num_free == 3
    assert pool.find([b"a", b"b", b"c"]) == blocks
    # The end of a sequence is evicted before its beginning.
    assert pool.allocate(1) == [blocks[2]]
    assert pool.find([b"a", b"b", b"c"]) == blocks[:2]
    assert pool.find([b"x", b"a"]) == []


def test_blocks_without_content_are_handed_out_first() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.publish(first, b"a")
    pool.release([first])
    pool.release([second])
    assert pool.allocate(1) == [second]


def test_sharing_keeps_a_block_out_of_reach() -> None:
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.publish(block, b"a")
    pool.share([block])
    pool.release([block])
    assert pool.num_used == 1
    assert pool.allocate(1) != [block]
    with pytest.raises(AssertionError, match="1 blocks, 0 are free"):
        pool.allocate(1)


def test_without_caching_nothing_is_found() -> None:
    pool = BlockPool(2, caching=False)
    pool.publish(pool.allocate(1)[0], b"a")
    assert pool.find([b"a"]) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 5)), max_size=60))
def test_the_books_balance_whatever_happens(actions: list[tuple[int, int]]) -> None:
    pool = BlockPool(8)
    held: list[list[int]] = []
    for kind, number in actions:
        if kind == 0 and number <= pool.num_free:
            held.append(pool.allocate(number))
        elif kind == 1 and held:
            pool.release(held.pop(number % len(held)))
        elif kind == 2 and held and held[number % len(held)]:
            pool.publish(held[number % len(held)][0], bytes([number]))
        elif kind == 3:
            found = pool.find([bytes([number])])
            pool.share(found)
            held.append(found)
        pool.check(held)
