"""Every row of docs/security.md is proven by tests that carry its id, or says why it can't be."""

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
