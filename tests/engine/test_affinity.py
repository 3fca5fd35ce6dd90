"""Which engine a request should meet: what is remembered of prompts, and when that weighs more than load."""

from collections.abc import Sequence

from sightline_server.engine.affinity import BLOCK_TOKENS, SLACK, PrefixMemory, pick, prompt_hashes
from sightline_server.engine.types import ImageSpan, Prompt, Request, SamplingParams

IMAGE_TOKEN = 7
SPARED = (0, 0, 0)


def request(token_ids: Sequence[int], *, picture: bytes | None = None, salt: bytes = b"") -> Request:
    images = (ImageSpan(0, BLOCK_TOKENS, picture),) if picture is not None else ()
    prompt = Prompt(tuple(token_ids), images)
    return Request(id="r", prompt=prompt, sampling=SamplingParams(max_tokens=1), cache_salt=salt)


def text(blocks: int, seed: int = 0) -> list[int]:
    return [(seed * 7919 + position) % 5003 for position in range(blocks * BLOCK_TOKENS)]


def test_a_conversation_is_known_by_all_its_turns_so_far() -> None:
    memory = PrefixMemory(2)
    turn = text(3)
    memory.note(prompt_hashes(request(turn)), 1)
    longer = prompt_hashes(request(turn + text(2, seed=1)))
    assert memory.known(longer) == [0, 3]
    memory.note(longer, 1)
    assert memory.known(longer) == [0, 5]
    assert memory.known(prompt_hashes(request(text(1) + text(1, seed=3)))) == [0, 1]
    assert memory.known([]) == [0, 0]


def test_pictures_tell_prompts_apart_and_bring_equal_ones_together() -> None:
    memory = PrefixMemory(2)
    look = [IMAGE_TOKEN] * BLOCK_TOKENS
    memory.note(prompt_hashes(request(look + text(1), picture=b"cat")), 0)
    assert memory.known(prompt_hashes(request(look + text(1, seed=9), picture=b"cat"))) == [1, 0]
    assert memory.known(prompt_hashes(request(look + text(1), picture=b"dog"))) == [0, 0]


def test_what_one_tenant_sent_draws_no_request_of_another() -> None:
    memory = PrefixMemory(2)
    memory.note(prompt_hashes(request(text(4), salt=b"one")), 1)
    assert memory.known(prompt_hashes(request(text(4), salt=b"other"))) == [0, 0]
    assert memory.known(prompt_hashes(request(text(4), salt=b"one"))) == [0, 4]


def test_memory_is_bounded_and_loses_the_end_of_what_was_met_least_recently() -> None:
    memory = PrefixMemory(2, capacity=8)
    old, new = prompt_hashes(request(text(5))), prompt_hashes(request(text(5, seed=1)))
    memory.note(old, 0)
    memory.note(new, 1)
    assert len(memory) == 8
    assert memory.known(old) == [3, 0]
    assert memory.known(new) == [0, 5]


def test_an_engine_that_was_started_anew_knows_nothing() -> None:
    memory = PrefixMemory(2)
    shared, own = prompt_hashes(request(text(2))), prompt_hashes(request(text(2, seed=1)))
    for engine in (0, 1):
        memory.note(shared, engine)
    memory.note(own, 0)
    memory.forget(0)
    assert memory.known(shared) == [0, 2]
    assert memory.known(own) == [0, 0]
    assert len(memory) == len(shared)


def test_the_engine_that_knows_most_is_preferred_within_bounds() -> None:
    assert pick({0: 0, 1: 0, 2: 0}, (0, 4, 9), SPARED) == 2
    assert pick({0: 0, 1: SLACK, 2: 0}, (0, 4, 0), SPARED) == 1
    assert pick({0: 1, 1: SLACK + 1, 2: 0}, (0, 4, 0), SPARED) == 2
    # A busy server may be less even, a quarter at most.
    assert pick({0: 40, 1: 50 + SLACK, 2: 40}, (0, 4, 0), (2, 0, 1)) == 1
    assert pick({0: 40, 1: 51 + SLACK, 2: 40}, (0, 4, 0), (2, 0, 1)) == 2


def test_of_equally_busy_engines_the_knowing_one_wins_and_then_the_longest_spared() -> None:
    assert pick({0: 3, 1: 3}, (0, 1), (1, 9)) == 1
    assert pick({0: 3, 1: 3}, (0, 0), (9, 1)) == 1
    assert pick({0: 2, 1: 3}, (0, 0), (9, 1)) == 0


def test_one_that_is_down_is_not_picked_for_what_it_knew() -> None:
    assert pick({0: 5, 2: 4}, (0, 9, 0), SPARED) == 2


def test_a_system_prompt_that_all_share_spreads_to_all_engines() -> None:
    memory = PrefixMemory(3)
    loads = dict.fromkeys(range(3), 0)
    for number in range(60):
        hashes = prompt_hashes(request(text(4) + text(1, seed=number + 1)))
        chosen = pick(loads, memory.known(hashes), SPARED)
        memory.note(hashes, chosen)
        loads[chosen] += 1
    assert max(loads.values()) - min(loads.values()) <= SLACK + 1
    assert memory.known(prompt_hashes(request(text(4)))) == [4, 4, 4]
