"""Every row of docs/security.md is proven by tests that carry its id, or says why it can't be; so is every advisory."""

import re
import subprocess
import sys
from pathlib import Path

import threat_rows

SCOPE = {
    "I": range(1, 19),
    "J": range(1, 19),
    "O": range(1, 15),
    "E": (*range(1, 6), *range(10, 16)),
    "K": (*range(1, 6), *range(9, 15)),
    "P": range(1, 5),
}
"""The groups of threats that what is built so far can meet."""


def test_the_page_has_every_row(repository: Path) -> None:
    page = threat_rows.rows((repository / "docs/security.md").read_text("utf-8"))
    assert set(page) == {f"{group}{number}" for group, numbers in SCOPE.items() for number in numbers}


def test_each_row_is_proven_or_explained(repository: Path) -> None:
    page = threat_rows.rows((repository / "docs/security.md").read_text("utf-8"))
    proven = threat_rows.proofs(repository / "tests")
    assert [row for row, explained in page.items() if row not in proven and not explained] == []
    assert set(proven) <= set(page), "a test carries the id of a row that the page hasn't"


def test_ids_are_read_from_names(tmp_path: Path) -> None:
    (tmp_path / "test_some.py").write_text(
        "def test_I4_I5_bombs(): ...\nasync def test_J2_depth(): ...\n"
        "def test_I_am_no_row(): ...\ndef test_x_K1_y(): ...\n"
        "class TestMore:\n    def test_K10_lines(self): ...\n"
    )
    assert threat_rows.proofs(tmp_path) == {
        "I4": ["test_I4_I5_bombs"],
        "I5": ["test_I4_I5_bombs"],
        "J2": ["test_J2_depth"],
        "K10": ["test_K10_lines"],
    }


def test_rows_are_read_from_the_page() -> None:
    page = "| row | what |\n|---|---|\n| I1 | a | b |\n| O9 | x | Not yet: no files |\n"
    assert threat_rows.rows(page) == {"I1": False, "O9": True}


def cases(file: Path) -> list[str]:
    """What stands between the brackets of each case of ``file``, as pytest finds them."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", str(file)]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert found.returncode == 0, found.stdout + found.stderr
    return re.findall(r"^\S+::test_\w+\[(.+)\]$", found.stdout, flags=re.MULTILINE)


def test_each_advisory_has_a_case_and_each_case_a_row(repository: Path) -> None:
    written = threat_rows.advisories((repository / "docs/security.md").read_text("utf-8"))
    replayed = cases(repository / "tests/e2e/test_advisories.py")
    assert sorted(name for name, _ in written) == sorted(replayed)
    assert len(replayed) == len(set(replayed)) > 50
    assert written == sorted(written, key=lambda row: (row[1].lower(), row[0]))


def test_what_waits_is_not_replayed_and_the_count_is_right(repository: Path) -> None:
    page = (repository / "docs/security.md").read_text("utf-8")
    replayed = {name for name, _ in threat_rows.advisories(page)}
    assert threat_rows.waiting(page)
    assert not replayed & threat_rows.waiting(page)
    assert f"all {len(replayed)} as written here" in page.replace("\n", " ")


def test_advisories_are_read_from_the_page() -> None:
    table = "| advisory | where | there | here |\n|---|---|---|---|\n"
    page = f"| CVE-1-1 | x | a | b |\n## Advisories of others, replayed\n{table}| CVE-2026-1 | A b | c | 400 `d` |\n"
    page += (
        "| llama.cpp-7 | A b | c | d |\n\n| advisory | what it waits for |\n|---|---|\n| B CVE-2026-2, #3; C #4 | e |\n"
    )
    assert threat_rows.advisories(page) == [("CVE-2026-1", "A b"), ("llama.cpp-7", "A b")]
    assert threat_rows.waiting(page) == {"CVE-2026-2", "#3", "#4"}
