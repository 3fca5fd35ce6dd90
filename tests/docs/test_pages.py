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


def test_the_requests_way_names_true_files(repository: Path) -> None:
    page = (repository / "docs/architecture.md").read_text(encoding="utf-8")
    way = page.split("## The request's way", 1)[1].split("## The rooms", 1)[0]
    stations = re.findall(r"^\d+\. (.*?): ", way, flags=re.MULTILINE)
    assert len(stations) >= 20
    missing = []
    for station in stations:
        room = ""
        for name in re.findall(r"`([^`]+)`", station):
            room = str(Path(name).parent) if "/" in name else room
            path = name if "/" in name or name == "sse.py" else f"{room}/{name}"
            roots = ("kernels", "models", "server", SERVER)
            if not any((repository / root / path).exists() for root in roots):
                missing.append(path)
    assert missing == []


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
