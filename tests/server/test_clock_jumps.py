"""The wall clock jumps a day ahead and two back, again and again: no deadline is missed, and none is met too soon."""

import ast
import asyncio
import itertools
import time
from pathlib import Path

import pytest
from api_calls import CHAT, chat_body, http
from fakes import FakeEngine, fake_app

import sightline_server

DAY_S = 86_400.0
# The clock of the day is for people and for files; nothing that waits may ask it.
MAY_ASK = {
    "auth/keys_file.py": {"_now"},
    "confined/template_renderer.py": {"render"},
    "routes/chat.py": {"_header", "_prepare"},
    "scratch.py": {"sweep"},
}
"""What is written down or shown is a date; files' own times are by this clock."""


@pytest.fixture
def jumping(monkeypatch: pytest.MonkeyPatch) -> None:
    true, jumps = time.time, itertools.cycle((DAY_S, -DAY_S, 0.0))
    monkeypatch.setattr(time, "time", lambda: true() + next(jumps))


@pytest.mark.usefixtures("jumping")
async def test_E11_chats_and_streams_are_answered_while_the_clock_jumps() -> None:
    engine = FakeEngine("abc")
    engine.step_s = 0.001
    async with http(fake_app(engine)) as client, asyncio.timeout(30):
        for stream in (False, True):
            answers = [await client.post(CHAT, json=chat_body(stream=stream)) for _ in range(6)]
            assert [answer.status_code for answer in answers] == [200] * 6
            assert "error" not in answers[-1].text
    assert engine.live == set()


def test_E11_nothing_that_waits_asks_the_wall_clock() -> None:
    root = Path(sightline_server.__file__).parent
    found: dict[str, set[str]] = {}
    for path in root.rglob("*.py"):
        for outer in ast.walk(ast.parse(path.read_text("utf-8"))):
            if not isinstance(outer, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            for call in ast.walk(outer):
                if isinstance(call, ast.Call) and ast.unparse(call.func) in ("time.time", "datetime.now"):
                    found.setdefault(str(path.relative_to(root)), set()).add(outer.name)
    assert found == MAY_ASK
