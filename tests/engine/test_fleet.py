"""Several engines as one: who gets a request, what becomes of it when its engine dies, and what all add up to."""

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from typing import Any

import msgspec
import numpy as np
import pytest
import worker_engines

from sightline_server.engine.affinity import BLOCK_TOKENS, SLACK
from sightline_server.engine.client import EngineClient, EngineStartError, PixelSource
from sightline_server.engine.fleet import EngineFleet, combine
from sightline_server.engine.types import (
    EngineInfo,
    EngineStats,
    FinishEvent,
    FinishReason,
    Prompt,
    Request,
    SamplingParams,
    TokenEvent,
    Usage,
)
from sightline_server.errors import Unavailable
from sightline_server.settings import Settings

Events = list[TokenEvent | FinishEvent]
INFO = worker_engines.INFO


class FakeMember(EngineClient):
    """Holds its requests until it is told to let them go, to abort them or to die."""

    restarts = 0

    def __init__(self, info: EngineInfo = INFO, *, failure: str | None = None) -> None:
        self.aborted: list[str] = []
        self.seen: list[str] = []
        self.started = False
        self.closed = False
        self.may_load = asyncio.Event()
        self.may_load.set()
        self.tells = EngineStats()
        self._found = info
        self._failure = failure
        self._up = asyncio.Event()
        self._was_up = False
        self._ends: dict[str, asyncio.Future[FinishEvent]] = {}

    @property
    def ready(self) -> bool:
        return self._up.is_set()

    @property
    def info(self) -> EngineInfo | None:
        return self._found if self._was_up else None

    @property
    def stats(self) -> EngineStats:
        return self.tells

    @property
    def in_flight(self) -> int:
        return len(self._ends)

    async def start(self) -> None:
        self.started = True

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        async with asyncio.timeout(timeout_s):
            await self.may_load.wait()
            if self._failure is not None:
                raise EngineStartError(self._failure)
            if not self._was_up:
                self.rise()
            await self._up.wait()

    async def close(self) -> None:
        self.closed = True
        self._failure = "The engine was stopped."
        self.may_load.set()

    async def submit(self, request: Request, pixels: PixelSource) -> AsyncGenerator[TokenEvent | FinishEvent, None]:
        if not self.ready:
            code = "engine_starting" if self.info is None else "engine_restarting"
            raise Unavailable("Not now.", code=code)
        self.seen.append(request.id)
        end = self._ends[request.id] = asyncio.get_running_loop().create_future()
        try:
            yield TokenEvent(request.id, 1)
            yield await end
        finally:
            self._ends.pop(request.id, None)

    def abort(self, request_id: str) -> None:
        if request_id in self._ends:
            self.aborted.append(request_id)
            self.end(request_id, FinishReason.ABORTED)

    def end(self, request_id: str, reason: FinishReason = FinishReason.LENGTH, code: str | None = None) -> None:
        self._ends.pop(request_id).set_result(FinishEvent(request_id, reason, Usage(), code))

    def die(self) -> None:
        self._up.clear()
        for request_id in list(self._ends):
            self.end(request_id, FinishReason.ERROR, "engine_restarting")

    def rise(self) -> None:
        if self._was_up:
            self.restarts += 1
        self._was_up = True
        self._up.set()


def fleet_of(members: Sequence[FakeMember], **settings: Any) -> EngineFleet:
    first, *others = members
    return EngineFleet(first, lambda _: others, Settings(engines=len(members), **settings))


async def ready_fleet(members: Sequence[FakeMember], **settings: Any) -> EngineFleet:
    fleet = fleet_of(members, **settings)
    await fleet.start()
    await fleet.wait_ready(5)
    return fleet


def prompt_of(blocks: int, seed: int = 0) -> tuple[int, ...]:
    return tuple((seed * 7919 + position) % 5003 for position in range(blocks * BLOCK_TOKENS))


def request(name: str, tokens: tuple[int, ...] = (1, 2, 3), *, max_tokens: int = 5) -> Request:
    return Request(id=name, prompt=Prompt(tokens), sampling=SamplingParams(max_tokens=max_tokens))


async def no_pixels(digest: bytes) -> np.ndarray[Any, Any]:
    raise AssertionError("no pixels were to be asked for")


async def collect(engine: EngineClient, wanted: Request) -> Events:
    return [event async for event in engine.submit(wanted, no_pixels)]


async def under_way(engine: EngineClient, *wanted: Request) -> "list[asyncio.Task[Events]]":
    """Requests, submitted in this order."""
    tasks = []
    for one in wanted:
        tasks.append(asyncio.create_task(collect(engine, one)))
        await asyncio.sleep(0)
    return tasks


async def eventually(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():  # noqa: ASYNC110 - what is awaited is another task's doing
            await asyncio.sleep(0.01)


async def test_what_nobody_knows_goes_to_the_least_busy_and_is_spread() -> None:
    members = [FakeMember(), FakeMember(), FakeMember()]
    fleet = await ready_fleet(members)
    await under_way(fleet, *(request(f"r{number}", prompt_of(2, seed=number)) for number in range(7)))
    assert [member.in_flight for member in members] == [3, 2, 2]
    members[1].end("r1")
    members[1].end("r4")
    await under_way(fleet, request("next", prompt_of(2, seed=99)))
    assert members[1].seen[-1] == "next"


async def test_a_conversation_stays_with_its_engine_until_that_has_too_much_to_do() -> None:
    members = [FakeMember(), FakeMember()]
    fleet = await ready_fleet(members)
    history = prompt_of(3)
    for turn in range(3):
        (task,) = await under_way(fleet, request(f"turn {turn}", history + prompt_of(turn, seed=turn)))
        members[0].end(f"turn {turn}")
        await task
        (task,) = await under_way(fleet, request(f"other {turn}", prompt_of(2, seed=50 + turn)))
        members[1].end(f"other {turn}")
        await task
    assert members[0].seen == ["turn 0", "turn 1", "turn 2"]
    await under_way(fleet, *(request(f"same {number}", history) for number in range(SLACK + 2)))
    assert members[0].in_flight == SLACK + 1
    assert members[1].seen[-1] == f"same {SLACK + 1}"


async def test_an_abort_reaches_the_engine_that_has_the_request() -> None:
    members = [FakeMember(), FakeMember()]
    fleet = await ready_fleet(members)
    first, second = await under_way(fleet, request("a"), request("b"))
    fleet.abort("b")
    fleet.abort("never heard of")
    assert [event.reason for event in await second if isinstance(event, FinishEvent)] == [FinishReason.ABORTED]
    assert (members[0].aborted, members[1].aborted) == ([], ["b"])
    members[0].end("a")
    assert [type(event) for event in await first] == [TokenEvent, FinishEvent]


async def test_leaving_early_closes_the_engines_side_too() -> None:
    members = [FakeMember(), FakeMember()]
    fleet = await ready_fleet(members)
    async with aclosing(fleet.submit(request("a"), no_pixels)) as events:
        async for _ in events:
            break
        assert members[0].in_flight == 1
    assert members[0].in_flight == 0


async def test_E4_an_engine_that_dies_ends_its_own_requests_and_the_others_go_on() -> None:
    members = [FakeMember(), FakeMember()]
    fleet = await ready_fleet(members)
    lost, kept = await under_way(fleet, request("lost", prompt_of(2)), request("kept"))
    members[0].die()
    assert [event.error_code for event in await lost if isinstance(event, FinishEvent)] == ["engine_restarting"]
    assert (fleet.ready, fleet.num_ready) == (True, 1)
    # What the dead one knew draws nothing.
    (moved,) = await under_way(fleet, request("moved", prompt_of(2)))
    assert members[1].seen == ["kept", "moved"]
    members[1].end("kept")
    assert [event.reason for event in await kept if isinstance(event, FinishEvent)] == [FinishReason.LENGTH]
    members[0].rise()
    assert (fleet.num_ready, fleet.restarts) == (2, 1)
    # It came back empty: the conversation stays where it was moved to.
    await under_way(fleet, request("again", prompt_of(2)))
    assert members[1].seen[-1] == "again"
    members[1].end("moved")
    await moved


async def test_E4_without_any_engine_the_refusal_is_an_engines_own_and_waiting_ends_with_the_first_to_return() -> None:
    members = [FakeMember(), FakeMember()]
    fleet = await ready_fleet(members)
    for member in members:
        member.die()
    assert not fleet.ready
    assert fleet.info is not None
    with pytest.raises(Unavailable) as refusal:
        await collect(fleet, request("a"))
    assert refusal.value.code == "engine_restarting"
    with pytest.raises(TimeoutError):
        await fleet.wait_ready(0.01)
    waiting = asyncio.create_task(fleet.wait_ready(5))
    await asyncio.sleep(0)
    members[1].rise()
    await waiting
    assert fleet.ready


async def test_it_is_ready_once_all_have_loaded_one_after_another() -> None:
    members = [FakeMember(), FakeMember(), FakeMember()]
    for member in members[1:]:
        member.may_load.clear()
    fleet = fleet_of(members)
    await fleet.start()
    await eventually(lambda: members[1].started)
    assert members[0].ready
    assert not members[2].started
    assert not fleet.ready
    assert fleet.info is None
    with pytest.raises(Unavailable) as refusal:
        await collect(fleet, request("a"))
    assert refusal.value.code == "engine_starting"
    members[1].may_load.set()
    await eventually(lambda: members[2].started)
    members[2].may_load.set()
    await fleet.wait_ready(5)
    assert fleet.num_ready == 3


async def test_on_gpus_all_but_the_first_load_at_once() -> None:
    names = [f"cuda:{index} (Card)" for index in range(3)]
    members = [FakeMember(msgspec.structs.replace(INFO, device=name)) for name in names]
    for member in members:
        member.may_load.clear()
    fleet = fleet_of(members)
    await fleet.start()
    await eventually(lambda: members[0].started)
    assert not members[1].started
    members[0].may_load.set()
    await eventually(lambda: members[1].started and members[2].started)
    for member in members:
        member.may_load.set()
    await fleet.wait_ready(5)
    assert fleet.info is not None
    assert fleet.info.device == "cuda:0 (Card), cuda:1 (Card), cuda:2 (Card)"


@pytest.mark.parametrize(
    ("failing", "sentence"),
    [(0, r"^No memory\.$"), (1, r"^Engine 2 of 2: No memory\. To have fewer, lower")],
    ids=["first", "second"],
)
async def test_a_first_start_that_fails_is_the_operators_to_see(failing: int, sentence: str) -> None:
    members = [FakeMember(failure="No memory." if index == failing else None) for index in range(2)]
    fleet = fleet_of(members)
    await fleet.start()
    for _ in range(2):
        with pytest.raises(EngineStartError, match=sentence):
            await fleet.wait_ready(5)
    assert not fleet.ready
    await fleet.close()
    assert members[0].closed


async def test_closing_while_loading_starts_nothing_more() -> None:
    members = [FakeMember(), FakeMember(), FakeMember()]
    members[1].may_load.clear()
    fleet = fleet_of(members)
    await fleet.start()
    waiting = asyncio.create_task(fleet.wait_ready())
    await eventually(lambda: members[1].started)
    await fleet.close()
    with pytest.raises(EngineStartError):
        await waiting
    assert all(member.closed for member in members)
    assert not members[2].started
    await fleet_of([FakeMember(), FakeMember()]).close()


async def test_devices_that_round_differently_are_refused_where_bytes_are_promised() -> None:
    kinds = [msgspec.structs.replace(INFO, device=device) for device in ("cuda:0 (One)", "cuda:1 (Other)")]
    fleet = fleet_of([FakeMember(kind) for kind in kinds], deterministic=True)
    await fleet.start()
    with pytest.raises(EngineStartError, match=r"devices of one kind, not \(One\) and \(Other\)\. Name equal GPUs"):
        await fleet.wait_ready(5)
    assert (await ready_fleet([FakeMember(kind) for kind in kinds])).ready
    alike = [msgspec.structs.replace(INFO, device=device) for device in ("cuda:0 (One)", "cuda:1 (One)")]
    assert (await ready_fleet([FakeMember(kind) for kind in alike], deterministic=True)).ready


async def test_the_queue_is_bounded_for_all_together() -> None:
    members = [FakeMember(), FakeMember()]
    fleet = await ready_fleet(members, max_queue=3)
    await under_way(fleet, *(request(f"r{number}") for number in range(3)))
    with pytest.raises(Unavailable, match="queue of 3 waiting requests is full"):
        await collect(fleet, request("one too many"))
    members[0].tells = EngineStats(running=1)
    await under_way(fleet, request("there is room now"))
    assert sum(member.in_flight for member in members) == 4


async def test_figures_add_up_and_a_request_must_fit_any_engine() -> None:
    members = [FakeMember(), FakeMember(msgspec.structs.replace(INFO, num_blocks=32, max_model_len=512))]
    fleet = await ready_fleet(members)
    members[0].tells = EngineStats(running=1, waiting=2, blocks_total=64, generated_tokens_total=10)
    members[1].tells = EngineStats(running=3, blocks_total=32, generated_tokens_total=5, steps_total=4)
    expected = EngineStats(running=4, waiting=2, blocks_total=96, generated_tokens_total=15, steps_total=4)
    assert fleet.stats == expected
    assert fleet.info is not None
    assert (fleet.info.num_blocks, fleet.info.max_model_len) == (96, 512)
    assert fleet.info.device == "cpu (fake), 2 engines"
    assert fleet.info.parameters == INFO.parameters
    assert combine([INFO]) == INFO
