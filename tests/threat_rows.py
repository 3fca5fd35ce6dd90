"""Which tests prove which rows of docs/security.md, told by their names. Knows nothing of what a row means."""

import ast
import re
from collections import defaultdict
from pathlib import Path

_PROOF = re.compile(r"test_((?:[A-Z]\d+_)+)")
_ADVISORY = re.compile(r"^\| ([\w.]+(?:-\d+)+) \| ([^|]+) \|[^|]+\|[^|]+\|$", flags=re.MULTILINE)
_ROW = re.compile(r"^\| ([A-Z]\d+) \|(.*)\|$", flags=re.MULTILINE)


def proofs(tests: Path) -> dict[str, list[str]]:
    """Row id -> the names of the tests that carry it, over every ``test_*.py`` under ``tests``."""
    found: dict[str, list[str]] = defaultdict(list)
    for file in sorted(tests.rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (named := _PROOF.match(node.name)):
                for row in named[1].strip("_").split("_"):
                    found[row].append(node.name)
    return dict(found)


def rows(page: str) -> dict[str, bool]:
    """Row id -> whether the page explains why it can't be proven yet."""
    written = _ROW.findall(page)
    assert len(written) == len({row for row, _ in written}), "a row stands twice in docs/security.md"
    return {row: "Not yet:" in text for row, text in written}


def summary(root: Path) -> str:
    """One line: how many rows there are, how many are proven and by how many tests."""
    known, proven = rows((root / "docs/security.md").read_text("utf-8")), proofs(root / "tests")
    tests = {name for names in proven.values() for name in names}
    waiting = [row for row in known if row not in proven]
    line = f"docs/security.md: {len(known)} rows, {len(known) - len(waiting)} proven by {len(tests)} tests"
    return f"{line}; not yet: {', '.join(waiting)}" if waiting else line


def advisories(page: str) -> list[tuple[str, str]]:
    """Name and place of each advisory that the page says is replayed, in the page's order."""
    _, _, section = page.partition("## Advisories of others, replayed\n")
    return _ADVISORY.findall(section)


def waiting(page: str) -> set[str]:
    """The advisories that the page's second list has, as they are written there."""
    _, _, table = page.partition("| advisory | what it waits for |\n")
    return set(re.findall(r"(?:CVE-|GHSA-|#)[\w-]+", table))
