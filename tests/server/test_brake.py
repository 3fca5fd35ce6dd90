"""Who collects refusals waits for them; nobody else does."""

import asyncio
import time

import httpx
from api_calls import CHAT, chat_body
from fakes import fake_app
from fastapi import FastAPI

from sightline_server.routes import brake

DELAY_S = 0.2


def client(app: FastAPI, address: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app, client=(address, 1)), base_url="http://localhost")


async def timed(http: httpx.AsyncClient, **fields: object) -> tuple[int, float]:
    began = time.perf_counter()
    answer = await http.post(CHAT, json=chat_body(**fields))
    return answer.status_code, time.perf_counter() - began


async def test_only_refusals_beyond_the_allowance_wait() -> None:
    app = fake_app(refusal_delay_s=DELAY_S)
    async with client(app, "10.0.0.1") as rude, client(app, "10.0.0.2") as other:
        first = [await timed(rude, colour="red") for _ in range(brake.BURST)]
        assert {status for status, _ in first} == {400}
        later = await asyncio.gather(*(timed(rude, colour="red") for _ in range(40)))
        answered = [await timed(rude), await timed(other), await timed(other, colour="red")]
    assert all(took < DELAY_S for _, took in first)
    # The allowance grew a little meanwhile.
    assert sum(took >= DELAY_S for _, took in later) >= 20
    assert [status for status, _ in answered] == [200, 200, 400]
    assert all(took < DELAY_S for _, took in answered)


async def test_the_allowance_comes_back() -> None:
    held = brake.RefusalBrake(fake_app(), delay_s=1.0)
    assert [held._take("a", 0.0) for _ in range(brake.BURST + 1)] == [True] * brake.BURST + [False]
    assert held._take("b", 0.0)
    assert [held._take("a", 1.0 / brake.RATE) for _ in range(2)] == [True, False]
    assert [held._take("a", 1000.0) for _ in range(brake.BURST + 1)] == [True] * brake.BURST + [False]


async def test_addresses_are_forgotten_one_by_one() -> None:
    held = brake.RefusalBrake(fake_app(), delay_s=1.0)
    for number in range(brake.MAX_ADDRESSES * 2):
        held._take(str(number), 0.0)
    assert len(held._allowances) == brake.MAX_ADDRESSES


async def test_refusals_for_want_of_room_never_wait() -> None:
    app = fake_app(refusal_delay_s=DELAY_S)
    app.state.draining = True
    async with client(app, "10.0.0.1") as http:
        answers = [await timed(http) for _ in range(brake.BURST + 8)]
    assert {status for status, _ in answers} == {503}
    assert all(took < DELAY_S for _, took in answers)
