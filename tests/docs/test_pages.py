"""What the pages point at exists: links between them, and the files the architecture page walks through."""

import re
from pathlib import Path

import pytest

SERVER = "server/sightline_server"


def pages(repository: Path) -> list[Path]:
    return [*repository.glob("*.md"), *(repository / "docs").glob("*.md")]


def test_links_between_pages_resolve(repository: Path) -> None:
    broken = []
    for page in pages(repository):
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.name}: {target}")
    assert broken == []


def named_files(cells: list[str]) -> list[str]:
    """Paths named in ``cells``; a bare name stands in the room of the path before it."""
    found = []
    for cell in cells:
        room = ""
        for name in re.findall(r"`([\w/.<>]+)`", cell):
            room = str(Path(name).parent) if "/" in name else room
            found.append(name if "/" in name or not room else f"{room}/{name}")
    return found


def missing(repository: Path, names: list[str]) -> list[str]:
    roots = ("kernels", "models", "server", SERVER)
    return [name for name in names if not any(list((repository / root).glob(name)) for root in roots)]


def test_the_requests_way_names_true_files(repository: Path) -> None:
    page = (repository / "docs/architecture.md").read_text(encoding="utf-8")
    way = page.split("## The request's way", 1)[1].split("## The rooms", 1)[0]
    stations = re.findall(r"^\d+\. (.*?): ", way, flags=re.MULTILINE)
    assert len(stations) == 24
    assert missing(repository, named_files(stations)) == []


def test_the_table_of_rooms_names_true_files(repository: Path) -> None:
    page = (repository / "docs/architecture.md").read_text(encoding="utf-8")
    rooms = page.split("## The rooms", 1)[1].split("\n## ", 1)[0]
    names = [name.replace("<op>", "*") for name in named_files(re.findall(r"^\| (`.*?) \|", rooms, flags=re.MULTILINE))]
    assert len(names) > 20
    assert missing(repository, [name.rstrip("/") for name in names if name.endswith(("/", ".py"))]) == []


@pytest.mark.parametrize("package", [SERVER, "models/sightline_models", "kernels/sightline_kernels"])
def test_every_init_is_empty(repository: Path, package: str) -> None:
    full = [str(path) for path in (repository / package).rglob("__init__.py") if path.stat().st_size]
    assert full == []


def test_nothing_below_settings_reads_the_environment(repository: Path) -> None:
    readers = re.compile(r"os\.(getenv|environ\.get|environ\[)")
    found = [
        str(path.relative_to(repository))
        for root in (SERVER, "models/sightline_models", "kernels/sightline_kernels")
        for path in (repository / root).rglob("*.py")
        if readers.search(path.read_text(encoding="utf-8"))
    ]
    assert [name for name in found if name != f"{SERVER}/settings.py" and "/cli/" not in name] == []
