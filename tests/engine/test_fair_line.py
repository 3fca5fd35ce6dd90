"""Tenants in the waiting line: whose turn it is, and how long one waits behind another's flood."""

from schedules import House

from sightline_server.engine.types import Sequence


def finish_drawn_out(house: House) -> None:
    for sequence in list(house.scheduler.running):
        if sequence.is_drawn_out:
            house.scheduler.finish(sequence)


def steps_until_computed(house: House, sequence: Sequence) -> int:
    """Steps until the sequence has its first token."""
    steps = 0
    while sequence.num_generated == 0:
        house.step()
        finish_drawn_out(house)
        steps += 1
        assert steps < 2000, "it is never served"
    return steps


def admitted(house: House, count: int) -> list[str]:
    """The first ``count`` in the order in which they are admitted, one at a time."""
    names: list[str] = []
    while len(names) < count:
        house.step()
        (sequence,) = house.scheduler.running
        names.append(sequence.id)
        house.scheduler.finish(sequence)
    return names


def test_O2_tenants_take_turns_and_each_is_served_as_it_came() -> None:
    house = House(max_running=1, prefix_caching=False)
    for index in range(4):
        house.add(f"a{index}", 8, tenant="a")
    for index in range(3):
        house.add(f"b{index}", 8, tenant="b")
    house.add("c0", 8, tenant="c")
    assert admitted(house, 8) == ["a0", "b0", "c0", "a1", "b1", "a2", "b2", "a3"]


def test_O2_turns_are_of_tokens_not_of_requests() -> None:
    house = House(max_running=1, prefix_caching=False)
    for index in range(3):
        house.add(f"long{index}", 40, tenant="long")
    for index in range(8):
        house.add(f"short{index}", 10, tenant="short")
    order = admitted(house, 8)
    assert order == ["long0", "short0", "short1", "short2", "short3", "long1", "short4", "short5"]


def test_O2_whoever_pauses_saves_nothing_up() -> None:
    house = House(max_running=1, prefix_caching=False)
    house.add("b early", 8, tenant="b")
    assert admitted(house, 1) == ["b early"]
    for index in range(20):
        house.add(f"a{index}", 8, tenant="a")
    admitted(house, 10)
    for index in range(3):
        house.add(f"b{index}", 8, tenant="b")
    order = admitted(house, 6)
    assert [name[0] for name in order] in (["a", "b"] * 3, ["b", "a"] * 3), order


def test_O2_a_class_is_served_before_the_next_whoever_waits_in_it() -> None:
    house = House(max_running=1, prefix_caching=False)
    house.add("a batch", 8, tenant="a", priority=1)
    house.add("b batch", 8, tenant="b", priority=1)
    house.add("a chat", 8, tenant="a")
    assert admitted(house, 3) == ["a chat", "b batch", "a batch"]


def test_what_was_preempted_comes_back_before_another_tenant_takes_its_room() -> None:
    house = House(num_blocks=5, prefix_caching=False)
    first, second = house.add("a1", 7, tenant="a"), house.add("a2", 7, tenant="a")
    house.step()
    while not house.step().preempted:
        pass
    house.add("b", 3, tenant="b")
    assert [sequence.id for sequence in house.scheduler.waiting] == ["a2", "b"]
    house.scheduler.finish(first)
    house.step()
    assert second in house.scheduler.running


def test_O14_a_flood_makes_others_wait_no_longer_than_a_full_house_does() -> None:
    def waits(flood: int) -> list[int]:
        """Steps to each first token of one who asks ten times, beside another's full house and ``flood`` more."""
        house = House(num_blocks=400, budget=64, max_running=8, prefix_caching=False)
        added, seen = 0, []
        for question in range(10):
            while added < 8 * (question + 1) + flood:
                house.add(f"flood{added}", 24, tenant="flood", max_tokens=16)
                added += 1
            asked = house.add(f"asked{question}", 24, tenant="other", max_tokens=4)
            seen.append(steps_until_computed(house, asked))
            while asked in house.scheduler.running:
                house.step()
                finish_drawn_out(house)
        return seen

    calm, flooded = waits(0), waits(300)
    assert max(flooded) <= 2 * max(calm), f"calm {calm}, flooded {flooded}"


def test_accounts_end_with_the_last_request() -> None:
    house = House()
    for name in "abc":
        house.add(name, 8, tenant=name)
    house.step()
    for sequence in [*house.scheduler.running, *house.scheduler.waiting]:
        house.scheduler.finish(sequence)
    assert len(house.scheduler.waiting) == 0
    house.add("d", 8, tenant="d")
    assert list(house.scheduler.waiting._served) == ["d"]
