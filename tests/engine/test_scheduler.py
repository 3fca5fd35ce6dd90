"""Plans without a model: budgets, order, preemption, waiting for pixels, sharing of prefixes."""

import pytest
from schedules import House, shape

from sightline_server.engine.scheduler import LEAST_BEFORE_IMAGE
from sightline_server.engine.types import (
    ImageSpan,
    SequenceStatus,
)


def test_decodes_stand_first_and_prompts_fill_the_budget() -> None:
    house = House(budget=8)
    house.add("a", 5)
    assert shape(house.step()) == [("a", 0, 5)]
    house.add("b", 20)
    assert shape(house.step()) == [("a", 5, 1), ("b", 0, 7)]
    assert shape(house.step()) == [("a", 6, 1), ("b", 7, 7)]
    assert shape(house.step()) == [("a", 7, 1), ("b", 14, 6)]
    assert shape(house.step()) == [("a", 8, 1), ("b", 20, 1)]


def test_prompts_beside_answers_are_read_in_smaller_pieces() -> None:
    house = House(budget=20, mixed_step_tokens=6)
    house.add("a", 18)
    assert shape(house.step()) == [("a", 0, 18)]
    house.add("b", 9)
    house.add("c", 5)
    assert shape(house.step()) == [("a", 18, 1), ("b", 0, 6)]
    assert shape(house.step()) == [("a", 19, 1), ("b", 6, 3), ("c", 0, 3)]
    house.scheduler.finish(house.scheduler.running[0])
    house.scheduler.finish(house.scheduler.running[0])
    assert shape(house.step()) == [("c", 3, 2)]


def test_first_come_first_served_within_a_class() -> None:
    house = House(budget=4)
    house.add("batch", 4, priority=1)
    house.add("first", 4)
    house.add("second", 4)
    assert [shape(house.step())[-1][0] for _ in range(3)] == ["first", "second", "batch"]


def test_no_more_run_than_allowed() -> None:
    house = House(max_running=2)
    for name in "abc":
        house.add(name, 3)
    house.step()
    assert [s.id for s in house.scheduler.running] == ["a", "b"]
    house.scheduler.finish(house.scheduler.running[0])
    house.step()
    assert [s.id for s in house.scheduler.running] == ["b", "c"]


def test_the_latest_comer_is_preempted_and_comes_back_in_its_place() -> None:
    house = House(num_blocks=5, prefix_caching=False)
    a, b = house.add("a", 7), house.add("b", 7)
    house.add("c", 3)
    house.step()
    assert [s.id for s in house.scheduler.running] == ["a", "b"]
    preempted: list[str] = []
    while not preempted:
        preempted = [s.id for s in house.step().preempted]
    assert preempted == ["b"]
    assert b.status is SequenceStatus.WAITING
    assert b.num_cached_tokens == 0
    assert [s.id for s in house.scheduler.waiting] == ["b", "c"]
    house.scheduler.finish(a)
    assert shape(house.step())[0] == ("b", 0, len(b.token_ids) - 1)
    assert house.scheduler.num_preemptions == 1


def test_a_prompt_seen_before_is_not_computed_again() -> None:
    house = House()
    tokens = tuple(range(17))
    first = house.add("a", tokens)
    house.step()
    second = house.add("b", tokens)
    assert shape(house.step()) == [("a", 17, 1), ("b", 16, 1)]
    assert second.num_hit_tokens == 16
    assert second.blocks[:4] == first.blocks[:4]
    # The last token is computed even when every block is known: something must be sampled from.
    third = house.add("c", tokens[:16])
    house.step()
    assert third.num_hit_tokens == 12


def test_a_block_is_findable_only_when_it_is_full() -> None:
    house = House(budget=6)
    tokens = tuple(range(17))
    first = house.add("a", tokens)
    assert shape(house.step()) == [("a", 0, 6)]
    house.scheduler.finish(first)
    second = house.add("b", tokens)
    assert shape(house.step()) == [("b", 4, 6)]
    assert second.num_hit_tokens == 4


def test_of_equal_prompts_at_once_one_is_computed() -> None:
    house = House()
    tokens = tuple(range(17))
    house.add("a", tokens)
    house.add("b", tokens)
    house.add("other", tuple(range(100, 109)))
    assert shape(house.step()) == [("a", 0, 17), ("other", 0, 9)]
    assert ("b", 16, 1) in shape(house.step())


def test_without_prefix_caching_equal_prompts_are_computed_apart() -> None:
    house = House(prefix_caching=False)
    house.add("a", tuple(range(17)))
    house.add("b", tuple(range(17)))
    assert shape(house.step()) == [("a", 0, 17), ("b", 0, 17)]


CAT, DOG = b"c" * 32, b"d" * 32


def test_a_sequence_waits_for_its_pixels_and_others_pass_it() -> None:
    house = House()
    house.add("look", 12, images=(ImageSpan(0, 8, CAT),))
    house.add("talk", 3)
    plan = house.step()
    assert shape(plan) == [("talk", 0, 3)]
    assert {(s.id, span.digest) for s, span in plan.wanted} == {("look", CAT)}
    house.pixels.add(CAT)
    plan = house.step()
    assert plan.encode == (CAT,)
    assert ("look", 0, 12) in shape(plan)
    assert house.vision.num_pinned == 0


def test_long_text_before_a_missing_image_is_computed_meanwhile() -> None:
    house = House(budget=128)
    start = LEAST_BEFORE_IMAGE
    house.add("look", start + 14, images=(ImageSpan(start, 8, CAT),))
    assert shape(house.step()) == [("look", 0, start)]
    assert shape(house.step()) == []
    house.pixels.add(CAT)
    assert shape(house.step()) == [("look", start, 14)]


def test_short_text_before_a_missing_image_comes_with_it() -> None:
    house = House(budget=128)
    start = LEAST_BEFORE_IMAGE - 1
    house.add("look", start + 14, images=(ImageSpan(start, 8, CAT),))
    plan = house.step()
    assert (shape(plan), {span.digest for _, span in plan.wanted}) == ([], {CAT})
    assert house.scheduler.running == []
    house.pixels.add(CAT)
    assert shape(house.step()) == [("look", 0, start + 14)]


def test_an_image_at_hand_is_encoded_before_the_next_one_comes() -> None:
    house = House()
    house.pixels.add(CAT)
    house.add("pair", 20, images=(ImageSpan(0, 8, CAT), ImageSpan(9, 8, DOG)))
    plan = house.step()
    assert (plan.encode, shape(plan)) == ((CAT,), [("pair", 0, 9)])
    house.pixels.add(DOG)
    assert shape(house.step()) == [("pair", 9, 11)]


def test_an_image_stays_pinned_while_its_tokens_are_cut_into_chunks() -> None:
    house = House(budget=3, encoder_cache_bytes=0)
    house.pixels.add(CAT)
    house.add("look", 10, images=(ImageSpan(1, 8, CAT),))
    plans = [house.step() for _ in range(4)]
    assert [plan.encode for plan in plans] == [(CAT,), (), (), ()]
    assert [shape(plan)[0][1:] for plan in plans] == [(0, 3), (3, 3), (6, 3), (9, 1)]
    assert CAT not in house.vision


def test_an_image_that_stands_twice_stays_pinned_through_its_second_place() -> None:
    house = House(budget=10, encoder_cache_bytes=0)
    house.pixels.add(CAT)
    house.add("twins", 22, images=(ImageSpan(0, 8, CAT), ImageSpan(8, 8, CAT)))
    first = house.step()
    house.pixels.clear()
    assert first.encode == (CAT,)
    assert [shape(house.step()) for _ in range(2)] == [[("twins", 10, 10)], [("twins", 20, 2)]]
    assert CAT not in house.vision


def test_images_a_step_are_bounded() -> None:
    house = House()
    spans = tuple(ImageSpan(4 * i, 4, bytes([i]) * 32) for i in range(5))
    house.pixels.update(span.digest for span in spans)
    house.add("album", 24, images=spans)
    first, second = house.step(), house.step()
    assert (len(first.encode), len(second.encode)) == (3, 2)
    assert shape(first) == [("album", 0, 12)]
    assert shape(second) == [("album", 12, 12)]


def test_a_cached_image_prefix_needs_no_pixels() -> None:
    house = House(encoder_cache_bytes=0)
    house.pixels.add(CAT)
    tokens = (7,) * 8 + tuple(range(9))
    house.add("a", tokens, images=(ImageSpan(0, 8, CAT),))
    house.step()
    house.pixels.clear()
    house.add("b", tokens[:8] + tuple(range(50, 56)), images=(ImageSpan(0, 8, CAT),))
    plan = house.step()
    assert plan.wanted == ()
    assert ("b", 8, 6) in shape(plan)


def test_finishing_anywhere_leaves_nothing_behind() -> None:
    house = House(budget=5, encoder_cache_bytes=0)
    house.pixels.add(CAT)
    a = house.add("a", 10, images=(ImageSpan(0, 8, CAT),))
    b = house.add("b", 10)
    house.step()
    assert house.vision.num_pinned == 1
    for sequence in (a, b):
        house.scheduler.finish(sequence)
    house.scheduler.check()
    assert house.blocks.num_used == 0
    assert len(house.vision) == 0


@pytest.mark.parametrize("num_blocks", [6, 9, 30])
def test_everything_ends_whatever_the_cache_size(num_blocks: int) -> None:
    house = House(num_blocks=num_blocks, budget=6, max_running=5)
    house.pixels.add(CAT)
    sequences = [house.add(f"r{i}", 4 + i, images=(ImageSpan(1, 3, CAT),) if i % 3 == 0 else ()) for i in range(10)]
    for _ in range(400):
        house.step()
        for sequence in sequences:
            if sequence.status is not SequenceStatus.FINISHED and sequence.num_generated >= 8:
                house.scheduler.finish(sequence)
    assert all(sequence.status is SequenceStatus.FINISHED for sequence in sequences)
    house.scheduler.check()
    assert house.blocks.num_used == 0
