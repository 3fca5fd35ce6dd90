"""What a key may use: buckets on a clock of the test's own, refusals that say when to come back, and no more."""

import asyncio
from typing import Any

import httpx
import openai
import pytest
from api_calls import CHAT, chat_body, eventually, http, openai_client, running
from fakes import FakeEngine, FakePool, fake_app, fake_image
from fastapi import FastAPI

from sightline_server.auth.bucket import Bucket
from sightline_server.auth.keys_file import create_key
from sightline_server.auth.principal import Limits, Principal, Scope
from sightline_server.auth.quotas import Quotas, duration
from sightline_server.errors import RateLimited


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class House:
    """The true app with two keys, one of them limited."""

    def __init__(self, folder: Any, engine: FakeEngine | None = None, **limits: Any) -> None:
        file = folder / "keys"
        self.entry, self.key = create_key(file, "ann", (Scope.CHAT,), Limits(**limits))
        _, self.other = create_key(file, "bob", (Scope.CHAT,), Limits())
        self.engine = engine or FakeEngine()
        self.pool = FakePool()
        self.clock = Clock()
        self.app: FastAPI = fake_app(self.engine, pool=self.pool, keys_file=str(file))
        self.app.state.context.quotas._clock = self.clock

    async def ask(self, key: str | None = None, **fields: Any) -> Any:
        async with http(self.app) as client:
            return await client.post(CHAT, json=chat_body(**fields), headers=self.bearer(key))

    def bearer(self, key: str | None = None) -> dict[str, str]:
        return {"Authorization": f"Bearer {key or self.key}"}


def refused(answer: Any) -> tuple[int, str, str, str | None]:
    error = answer.json()["error"]
    return answer.status_code, error["type"], error["code"], answer.headers.get("retry-after")


def test_a_bucket_fills_with_time_and_a_debt_is_waited_off() -> None:
    bucket = Bucket(60, now=0.0)
    assert bucket.wait_s(60, 0.0) == 0
    bucket.use(60, 0.0)
    assert bucket.wait_s(1, 0.0) == 1
    assert bucket.wait_s(61, 0.0) == float("inf")
    assert bucket.level(30.0) == 30
    bucket.use(50, 30.0)
    assert bucket.level(30.0) == -20
    assert bucket.wait_s(1, 30.0) == 21
    assert bucket.level(1e6) == 60, "no more than a minute's worth"
    bucket.use(-100, 1e6)
    assert bucket.level(1e6) == 60
    assert bucket.level(5.0) == 60, "a clock that goes back gives and takes nothing"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0ms"), (0.012, "12ms"), (1.0, "1s"), (1.5, "1.5s"), (59.9999, "1m0s"), (360, "6m0s"), (61.5, "1m1.5s")],
)
def test_durations_as_openai_writes_them(seconds: float, text: str) -> None:
    assert duration(seconds) == text


async def test_O1_requests_a_minute(tmp_path: Any) -> None:
    house = House(tmp_path, requests_per_minute=2)
    first = await house.ask()
    assert first.status_code == 200
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-reset-requests"] == "30s"
    assert "x-ratelimit-limit-tokens" not in first.headers
    await house.ask()
    third = await house.ask()
    assert refused(third) == (429, "rate_limit_error", "rate_limit_exceeded", "30")
    assert third.headers["x-ratelimit-remaining-requests"] == "0"
    assert third.headers["x-ratelimit-reset-requests"] == "1m0s"
    assert len(house.engine.requests) == 2
    house.clock.now += 29
    assert refused(await house.ask())[3] == "1"
    house.clock.now += 1
    assert (await house.ask()).status_code == 200
    other = await house.ask(house.other)
    assert other.status_code == 200
    assert not [name for name in other.headers if name.startswith("x-ratelimit")]


async def test_O1_a_limit_is_told_before_the_body_is_read(tmp_path: Any) -> None:
    house = House(tmp_path, requests_per_minute=1)
    await house.ask()
    async with http(house.app) as client:
        answer = await client.post(CHAT, content=b"no json", headers=house.bearer())
    assert answer.status_code == 429


async def test_tokens_are_reserved_and_settled(tmp_path: Any) -> None:
    house = House(tmp_path, FakeEngine("four"), tokens_per_minute=100)
    first = await house.ask(max_tokens=50)
    used = first.json()["usage"]["total_tokens"]
    assert int(first.headers["x-ratelimit-remaining-tokens"]) == 100 - first.json()["usage"]["prompt_tokens"] - 50
    account = house.app.state.context.quotas._accounts[house.entry.id]
    assert account._tokens.level(house.clock.now) == 100 - used
    # Without max_tokens the whole bucket is set aside, however long an answer the model could give.
    second = await house.ask()
    assert second.status_code == 429
    house.clock.now += 60
    assert (await house.ask()).status_code == 200
    assert account._tokens.level(house.clock.now) == 100 - used


async def test_a_stream_settles_what_it_said_when_its_reader_leaves(tmp_path: Any) -> None:
    engine = FakeEngine("0123456789")
    engine.pause_after = 4
    house = House(tmp_path, engine, tokens_per_minute=1000)
    account = house.app.state.context.quotas.account(house.app.state.context.keyring.find(house.key.encode()))
    with running(house.app) as address:
        async with httpx.AsyncClient() as http_client:
            body = chat_body(stream=True, max_tokens=200)
            async with http_client.stream("POST", address + CHAT, json=body, headers=house.bearer()) as answer:
                async for line in answer.aiter_lines():
                    if '"content":"0123"' in line or '"content":"3"' in line:
                        break
                assert account._tokens.level(house.clock.now) < 800
        await eventually(lambda: account._tokens.level(house.clock.now) > 900)
        await eventually(lambda: account.running.count == 0)
    prompt = len(engine.requests[0].prompt.token_ids)
    assert account._tokens.level(house.clock.now) == 1000 - prompt - 4


async def test_a_prompt_over_the_whole_limit_is_not_to_be_tried_again(tmp_path: Any) -> None:
    house = House(tmp_path, tokens_per_minute=20)
    answer = await house.ask(messages=[{"role": "user", "content": "x" * 100}])
    assert refused(answer) == (429, "rate_limit_error", "rate_limit_exceeded", None)
    assert answer.headers["x-should-retry"] == "false"
    assert "Send less" in answer.json()["error"]["message"]
    assert house.engine.requests == []


async def test_O1_images_are_counted_before_one_is_decoded(tmp_path: Any) -> None:
    house = House(tmp_path, images_per_minute=3)
    two = [{"role": "user", "content": [fake_image("a"), fake_image("b")]}]
    assert (await house.ask(messages=two)).status_code == 200
    assert house.pool.decoded_total == 2
    assert refused(await house.ask(messages=two)) == (429, "rate_limit_error", "rate_limit_exceeded", "20")
    assert house.pool.decoded_total == 2
    assert (await house.ask()).status_code == 200, "text alone is not held up"


async def test_megapixels_may_end_in_a_debt_that_the_next_request_waits_off(tmp_path: Any) -> None:
    house = House(tmp_path, megapixels_per_minute=6)
    picture = [{"role": "user", "content": [fake_image("3000x3000 a")]}]
    assert (await house.ask(messages=picture)).status_code == 200
    assert refused(await house.ask(messages=picture))[3] == "40", "a debt of 3, and one to go on with, at 6 a minute"
    assert house.pool.decoded_total == 1
    house.clock.now += 40
    assert (await house.ask(messages=picture)).status_code == 200
    bad = [{"role": "user", "content": [fake_image("1000x1000 b"), fake_image("bad")]}]
    house.clock.now += 120
    assert (await house.ask(messages=bad)).status_code == 400
    account = house.app.state.context.quotas._accounts[house.entry.id]
    # What was sent counts, whatever became of it.
    assert account._megapixels.level(house.clock.now) == pytest.approx(3, abs=1e-3)


@pytest.mark.parametrize("stream", [False, True])
async def test_no_more_run_at_once_than_allowed(tmp_path: Any, stream: bool) -> None:
    engine = FakeEngine("0123456789")
    engine.pause_after = 2
    house = House(tmp_path, engine, max_concurrent=2)
    asking = [asyncio.create_task(house.ask(stream=stream)) for _ in range(2)]
    await eventually(lambda: len(engine.live) == 2)
    assert refused(await house.ask()) == (429, "rate_limit_error", "rate_limit_exceeded", "1")
    other = asyncio.create_task(house.ask(house.other))
    await eventually(lambda: len(engine.live) == 3)
    engine.go_on.set()
    assert [answer.status_code for answer in await asyncio.gather(*asking, other)] == [200] * 3
    assert (await house.ask()).status_code == 200


async def test_the_client_retries_a_limit_as_it_should(tmp_path: Any) -> None:
    house = House(tmp_path, requests_per_minute=1)
    client = openai_client(house.app, api_key=house.key)
    fields: Any = chat_body()
    await client.chat.completions.create(**fields)
    with pytest.raises(openai.RateLimitError) as caught:
        await client.chat.completions.create(**fields)
    assert caught.value.code == "rate_limit_exceeded"


def test_changed_limits_count_from_now_and_running_requests_stay_counted() -> None:
    clock = Clock()
    quotas = Quotas(clock)

    def account(**limits: Any) -> Any:
        return quotas.account(Principal("key_1", "ann", frozenset(Scope), Limits(**limits), b""))

    with account(requests_per_minute=1, max_concurrent=1).request():
        assert account(requests_per_minute=1, max_concurrent=1) is account(requests_per_minute=1, max_concurrent=1)
        changed = account(requests_per_minute=5, max_concurrent=1)
        with pytest.raises(RateLimited, match="1 requests of this key are being answered"):
            changed.request().__enter__()
    with changed.request():
        pass
