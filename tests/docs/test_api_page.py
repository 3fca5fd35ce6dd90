"""The field lists of docs/api.md are those of the protocol: none is missing, none is on a wrong list."""

import re
from pathlib import Path

import pytest

from sightline_server.protocol.chat import ACCEPTED_WITHOUT_EFFECT, NEVER, NOT_BUILT, ChatRequest

NOT_YET = {"tools", "tool_choice", "functions", "function_call"}
"""Parsed so that their empty forms pass; anything else in them is refused."""


@pytest.fixture(scope="module")
def page(repository: Path) -> str:
    return (repository / "docs" / "api.md").read_text(encoding="utf-8")


def fields_under(page: str, heading: str) -> set[str]:
    section = page.split(f"### {heading}\n", 1)[1].split("\n#", 1)[0]
    names = re.findall(r"^\| `(\w+)`", section, flags=re.MULTILINE)
    assert len(names) == len(set(names)), f"a field stands twice under {heading}"
    return set(names)


def test_honoured_fields(page: str) -> None:
    assert fields_under(page, "Honoured") == set(ChatRequest.model_fields) - set(ACCEPTED_WITHOUT_EFFECT) - NOT_YET


def test_accepted_fields(page: str) -> None:
    assert fields_under(page, "Accepted without effect") == set(ACCEPTED_WITHOUT_EFFECT)


def test_refused_fields(page: str) -> None:
    assert fields_under(page, "Refused") == NOT_YET | set(NOT_BUILT) | set(NEVER) | {"chat_template"}


def test_picture_codes(page: str, repository: Path) -> None:
    sources = [repository / "models/sightline_models", repository / "server/sightline_server/chat"]
    code = re.compile(r'ImageError\(\s*"(\w+)"')
    raised = {
        found for root in sources for file in root.rglob("*.py") for found in code.findall(file.read_text("utf-8"))
    }
    section = page.split("## Pictures\n", 1)[1].split("\n## ", 1)[0]
    assert set(re.findall(r"^\| `(\w+)`", section, flags=re.MULTILINE)) == raised
