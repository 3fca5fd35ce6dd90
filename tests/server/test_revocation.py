"""A key that ends while its owner's answers are under way, and what a key without a scope is told."""

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
import pytest
from api_calls import CHAT, chat_body, events, eventually, http, running
from fakes import FakeEngine, fake_app

from sightline_server.auth.keys_file import create_key, revoke_key
from sightline_server.auth.principal import Limits, Scope

ENDS_WITHIN_S = 1.0


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def limit_to_one_a_minute(file: Path) -> None:
    entry = json.loads(file.read_text()) | {"limits": {"requests_per_minute": 1}}
    file.write_text(json.dumps(entry) + "\n")


async def test_K14_a_revoked_keys_answers_end_and_nobody_elses(file: Path) -> None:
    engine = FakeEngine("0123456789")
    engine.pause_after = 4
    _, revoked = create_key(file, "ann", (Scope.CHAT,), Limits())
    _, kept = create_key(file, "bob", (Scope.CHAT,), Limits())
    app = fake_app(engine, keys_file=str(file), sse_keep_alive_s=0.05)
    with running(app) as address:
        async with httpx.AsyncClient(base_url=address, timeout=30) as client:

            def ask(key: str, **fields: Any) -> "asyncio.Task[httpx.Response]":
                return asyncio.create_task(client.post(CHAT, json=chat_body(**fields), headers=bearer(key)))

            stream, whole, several = ask(revoked, stream=True), ask(revoked), ask(revoked, stream=True, n=3)
            other = ask(kept, stream=True)
            await eventually(lambda: len(engine.live) == 6)
            await asyncio.sleep(0.1)
            revoke_key(file, "ann")
            began = asyncio.get_running_loop().time()
            asyncio.get_running_loop().call_soon(app.state.context.keyring.reload)
            for answer in (await stream, await several):
                assert answer.status_code == 200
                *said, error = events(answer.text)
                assert error["error"]["code"] == "invalid_api_key"
                assert "revoked" in error["error"]["message"]
                assert "0123" in "".join(c["delta"].get("content", "") for chunk in said for c in chunk["choices"])
                assert "[DONE]" not in answer.text
            assert (await whole).status_code == 401
            assert asyncio.get_running_loop().time() - began < ENDS_WITHIN_S
            await eventually(lambda: len(engine.live) == 1)
            assert (await client.get("/v1/models", headers=bearer(revoked))).status_code == 401
            engine.go_on.set()
            assert events((await other).text)[-1] == "[DONE]"


async def test_K14_a_key_revoked_while_its_request_is_prepared(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sightline_server.chat.prompt import build_prompt

    engine = FakeEngine("abc")
    _, key = create_key(file, "ann", (Scope.CHAT,), Limits())
    app = fake_app(engine, keys_file=str(file))

    def slow(*arguments: Any) -> Any:
        revoke_key(file, "ann")
        app.state.context.keyring.reload()
        return build_prompt(*arguments)

    monkeypatch.setattr("sightline_server.routes.chat.build_prompt", slow)
    async with http(app) as client:
        answer = await client.post(CHAT, json=chat_body(), headers=bearer(key))
    assert answer.status_code == 401
    assert not engine.live


async def test_K14_changed_limits_end_nothing(file: Path) -> None:
    engine = FakeEngine("0123456789")
    engine.pause_after = 4
    _, key = create_key(file, "ann", (Scope.CHAT,), Limits())
    app = fake_app(engine, keys_file=str(file))
    with running(app) as address:
        async with httpx.AsyncClient(base_url=address, timeout=30) as client:
            asked = asyncio.create_task(client.post(CHAT, json=chat_body(), headers=bearer(key)))
            await eventually(lambda: len(engine.live) == 1)
            limit_to_one_a_minute(file)
            app.state.context.keyring.reload()
            engine.go_on.set()
            assert (await asked).status_code == 200
            answers = [await client.post(CHAT, json=chat_body(), headers=bearer(key)) for _ in range(2)]
    assert [answer.status_code for answer in answers] == [200, 429]


async def test_K13_admin_routes_want_an_admins_key(file: Path) -> None:
    _, user = create_key(file, "ann", (Scope.CHAT, Scope.FILES, Scope.BATCHES), Limits())
    _, admin = create_key(file, "root", (Scope.ADMIN,), Limits())
    async with http(fake_app(keys_file=str(file))) as client:
        refused = await client.get("/metrics", headers=bearer(user))
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
        assert "'admin'" in refused.json()["error"]["message"]
        assert (await client.get("/metrics", headers=bearer(admin))).status_code == 200
        refused = await client.post(CHAT, json=chat_body(), headers=bearer(admin))
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "insufficient_scope")
        for key in (user, admin):
            for path in ("/v1/models", "/openapi.json"):
                assert (await client.get(path, headers=bearer(key))).status_code == 200


async def test_a_keys_file_without_a_key_in_force_lets_nobody_in(file: Path) -> None:
    create_key(file, "ann", (Scope.CHAT,), Limits())
    revoke_key(file, "ann")
    async with http(fake_app(keys_file=str(file))) as client:
        assert (await client.get("/v1/models")).status_code == 401
        assert (await client.get("/health")).status_code == 200
