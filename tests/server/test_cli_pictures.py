"""Pictures named by path in a line: which words are files, and what is left of the question."""

import pytest

from sightline_server.cli.pictures import split_paths, take_apart


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("a.png", "b.JPG", "my cat.png", "it's.webp", "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


@pytest.mark.parametrize(
    ("line", "question", "names"),
    [
        ("what is this?", "what is this?", []),
        ("~/a.png what is this?", "what is this?", ["a.png"]),
        ("What is this? ~/a.png", "What is this?", ["a.png"]),
        ("what is in ~/a.png?", "what is in a.png?", ["a.png"]),
        ("compare a.png with ./b.JPG.", "compare a.png with b.JPG.", ["a.png", "b.JPG"]),
        ("'{root}/my cat.png' \"{root}/it's.webp\" which?", "which?", ["my cat.png", "it's.webp"]),
        ("{root}/my\\ cat.png", "", ["my cat.png"]),
        ("{root}/my cat.png", "", ["my cat.png"]),
        ("file://{root}/my%20cat.png", "", ["my cat.png"]),
        ("don't read notes.txt", "don't read notes.txt", []),
        ("a.png is `a name`", "is `a name`", ["a.png"]),
    ],
)
def test_take_apart(folder, line, question, names):
    parts = take_apart(line.replace("{root}", str(folder)))
    assert parts.question == question
    assert [path.name for path in parts.paths] == names
    assert all(path.is_file() for path in parts.paths)
    assert parts.missing == ()


@pytest.mark.parametrize(
    ("line", "missing"),
    [("~/gone.png?", ("~/gone.png?",)), ("`/gone.png` is text", ()), ("http://h/gone.png", ()), ("gone.png", ())],
)
def test_missing_pictures(folder, line, missing):
    assert take_apart(line).missing == missing


def test_split_paths_of_the_image_command(folder):
    assert [path.name for path in split_paths("a.png 'my cat.png' gone.png")] == ["a.png", "my cat.png", "gone.png"]
    assert [path.name for path in split_paths(f"{folder}/my cat.png")] == ["my cat.png"]
    assert split_paths("  ") == []
