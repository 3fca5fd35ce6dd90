"""Who may call: every route but two needs a key when there are keys, and a key says nothing of another."""

from pathlib import Path

import openai
import pytest
from api_calls import CHAT, chat_body, http, openai_client
from fakes import FakeEngine, FakePool, fake_app, fake_image

from sightline_server.auth.keyring import plain_keys
from sightline_server.settings import Settings, SettingsError

KEYS = ("sk-one", "sk-zwö")


def bearer(key: str) -> dict[str, bytes]:
    return {"Authorization": b"Bearer " + key.encode()}


@pytest.mark.parametrize("key", KEYS)
async def test_each_key_opens(key: str) -> None:
    async with http(fake_app(api_key=KEYS)) as client:
        for path in ("/v1/models", "/metrics", "/openapi.json"):
            assert (await client.get(path, headers=bearer(key))).status_code == 200
        assert (await client.post(CHAT, json=chat_body(), headers=bearer(key))).status_code == 200


async def test_every_route_is_closed_without_a_key() -> None:
    app = fake_app(api_key=KEYS)
    paths = set(app.openapi()["paths"]) | {"/docs", "/openapi.json", "/nope", "//v1/models", "/health/", "/%2e/health"}
    async with http(app) as client:
        for path in paths - {"/health", "/ready"}:
            for method in ("GET", "POST", "OPTIONS", "HEAD"):
                answer = await client.request(method, path)
                assert answer.status_code == 401, f"{method} {path}"
                assert answer.headers["www-authenticate"] == "Bearer"
                assert answer.headers["x-request-id"]
        for path in ("/health", "/ready"):
            assert (await client.get(path)).status_code == 200


@pytest.mark.parametrize(
    "header",
    [b"", b"Bearer", b"Bearer ", b"Bearer sk-on", b"Bearer sk-one2", b"Basic sk-one", b"sk-one", b"Bearer \xff\xfe"],
)
async def test_wrong_keys_all_look_the_same(header: bytes) -> None:
    async with http(fake_app(api_key=KEYS)) as client:
        missing = await client.get("/v1/models")
        wrong = await client.get("/v1/models", headers={"Authorization": header})
    assert wrong.status_code == missing.status_code == 401
    assert wrong.content == missing.content
    assert wrong.json()["error"]["code"] == "invalid_api_key"


async def test_two_headers_are_none() -> None:
    async with http(fake_app(api_key=KEYS)) as client:
        answer = await client.get("/v1/models", headers=[("Authorization", "Bearer sk-one")] * 2)
    assert answer.status_code == 401


async def test_lower_case_scheme() -> None:
    async with http(fake_app(api_key=KEYS)) as client:
        assert (await client.get("/v1/models", headers={"authorization": "bearer sk-one"})).status_code == 200


@pytest.mark.parametrize("header", [None, b"Bearer ", b"Bearer anything"])
async def test_without_keys_anything_goes(header: bytes | None) -> None:
    async with http(fake_app()) as client:
        headers = {} if header is None else {"Authorization": header}
        assert (await client.get("/v1/models", headers=headers)).status_code == 200


async def test_the_client_raises_what_it_should() -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        await openai_client(fake_app(api_key=KEYS)).models.list()
    assert caught.value.code == "invalid_api_key"


async def test_an_unread_body_is_not_needed_to_refuse() -> None:
    async with http(fake_app(api_key=KEYS, max_body_mb=0.001)) as client:
        answer = await client.post(CHAT, content=b"x" * 10_000)
    assert answer.status_code == 401


async def test_keys_share_no_cache() -> None:
    engine, pool = FakeEngine(), FakePool()
    body = chat_body(messages=[{"role": "user", "content": [fake_image()]}])
    async with http(fake_app(engine, pool=pool, api_key=KEYS)) as client:
        for key in (*KEYS, KEYS[0]):
            await client.post(CHAT, json=body, headers=bearer(key))
    first, second, third = (request.cache_salt for request in engine.requests)
    assert first == third != second
    assert b"" not in (first, second)
    assert pool.salts == [first, second, third]
    assert KEYS[0].encode() not in first
    async with http(fake_app(engine, pool=pool)) as client:
        await client.post(CHAT, json=body)
    assert engine.requests[-1].cache_salt == b""


def test_keys_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text("# ours\nsk-a\n\n  sk-b  # for ann\nsk-a\n", "utf-8")
    assert plain_keys(Settings(api_key=("sk-c",), api_key_file=str(file))) == ("sk-c", "sk-a", "sk-b")
    file.write_text("# none yet\n", "utf-8")
    with pytest.raises(SettingsError, match="holds no key"):
        plain_keys(Settings(api_key_file=str(file)))


@pytest.mark.parametrize("key", ["", "a b", "a\tb", "a\nb"])
def test_keys_that_no_client_could_send(key: str) -> None:
    with pytest.raises(SettingsError, match="API key number 1"):
        plain_keys(Settings(api_key=(key,)))


async def test_browsers_of_allowed_origins_alone() -> None:
    preflight = {
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-stainless-lang",
    }
    app = fake_app(api_key=KEYS, cors_origins=("https://app.example",))
    async with http(app) as client:
        allowed = await client.options(CHAT, headers=preflight | {"Origin": "https://app.example"})
        foreign = await client.options(CHAT, headers=preflight | {"Origin": "https://evil.example"})
        refused = await client.get("/v1/models", headers={"Origin": "https://app.example"})
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == "https://app.example"
    assert "x-stainless-lang" in allowed.headers["access-control-allow-headers"]
    assert "access-control-allow-origin" not in foreign.headers
    assert refused.status_code == 401
    assert refused.headers["access-control-allow-origin"] == "https://app.example", "so that the page can read why"
    async with http(fake_app()) as client:
        answer = await client.get("/v1/models", headers={"Origin": "https://app.example"})
    assert "access-control-allow-origin" not in answer.headers
