"""Every static gate is seen to pass on a clean copy of a part of the tree and to fail on a planted fault."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PACKAGES = ("server/sightline_server", "models/sightline_models", "kernels/sightline_kernels")
SMALL = tuple(f"server/sightline_server/{name}.py" for name in ("settings", "setting_rows", "errors"))


@pytest.fixture
def tree(tmp_path: Path, repository: Path) -> Path:
    """A copy of the scripts, of two small modules that import nothing outside the standard library, and of what the
    docs gate reads."""
    kept = (
        "pyproject.toml",
        "Dockerfile.gpu",
        "README.md",
        "benchmarks/__init__.py",
        "benchmarks/chart.py",
        "benchmarks/figures.py",
        "benchmarks/gpu/__init__.py",
        "benchmarks/gpu/targets.py",
        "benchmarks/report.py",
        "benchmarks/tables.py",
        "docs/performance.md",
        "docs/settings.md",
        "scripts/check",
        "scripts/docs.py",
        "scripts/install",
    )
    for name in (*kept, *SMALL):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(repository / name, tmp_path / name)
    shutil.copytree(repository / "benchmarks/results", tmp_path / "benchmarks/results")
    if (repository / "docs/performance.svg").exists():
        shutil.copy(repository / "docs/performance.svg", tmp_path / "docs/performance.svg")
    for package in PACKAGES:
        (tmp_path / package).mkdir(parents=True, exist_ok=True)
        (tmp_path / package / "__init__.py").touch()
    return tmp_path


@pytest.fixture(scope="module")
def whole_tree(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """A copy of every Python file of the three packages; a test removes what it plants."""
    copy = tmp_path_factory.mktemp("tree")
    for package in PACKAGES:
        only_code = shutil.ignore_patterns("__pycache__", "checkpoint", "*.bin")
        shutil.copytree(repository / package, copy / package, ignore=only_code)
    (copy / "scripts").mkdir()
    shutil.copy(repository / "scripts/check", copy / "scripts/check")
    shutil.copy(repository / "pyproject.toml", copy / "pyproject.toml")
    return copy


def run_gate(tree: Path, gate: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TOOLS": str(Path(sys.executable).parent)}
    return subprocess.run(
        ["bash", "scripts/check", gate], cwd=tree, env=environment, capture_output=True, text=True, timeout=150
    )


def append(name: str, text: str) -> Callable[[Path], None]:
    def plant(tree: Path) -> None:
        with (tree / name).open("a", encoding="utf-8") as file:
            file.write(text)

    return plant


def add_a_gpu_result(tree: Path) -> None:
    path = tree / "benchmarks/results/gpu-planted-9999-12-31/verdicts.json"
    path.parent.mkdir()
    path.write_text('{"machine": {}, "rows": {}}', encoding="utf-8")


def edit_a_figure(tree: Path) -> None:
    path = tree / "README.md"
    path.write_text(
        path.read_text(encoding="utf-8").replace("<!-- end of perf", "1,000x\n<!-- end of perf", 1), "utf-8"
    )


def unpin_the_base_image(tree: Path) -> None:
    path = tree / "Dockerfile.gpu"
    path.write_text(path.read_text(encoding="utf-8").replace("-runtime-", "-runtime-latest-", 1), encoding="utf-8")
    append("Dockerfile.gpu", "FROM ubuntu:latest\nRUN cd /tmp && sudo true\n")(tree)


@pytest.mark.parametrize(
    ("gate", "plant", "said"),
    [
        ("format", append(SMALL[1], "x  =  1\n"), "reformatted"),
        ("lint", append(SMALL[1], "\n\nimport os\n"), "F401"),
        ("types", append(SMALL[1], '\n\nplanted: int = "text"\n'), "Incompatible types in assignment"),
        ("types", append(SMALL[1], "\n\ndef planted(x):\n    return x\n"), "missing a type annotation"),
        ("docs", append("docs/settings.md", "| `--planted` |\n"), "stale"),
        ("docs", add_a_gpu_result, "docs/performance.md is stale"),
        ("docs", edit_a_figure, "README.md is stale"),
        ("dockerfile", unpin_the_base_image, "DL3007"),
        ("shell", append("scripts/install", "rm -rf $1\n"), "SC2086"),
    ],
    ids=["format", "lint", "types", "untyped", "docs", "result", "figure", "dockerfile", "shell"],
)
def test_gate_fails_on_a_planted_fault(tree: Path, gate: str, plant: Callable[[Path], None], said: str) -> None:
    clean = run_gate(tree, gate)
    assert clean.returncode == 0, clean.stdout + clean.stderr
    plant(tree)
    faulty = run_gate(tree, gate)
    assert faulty.returncode == 1, faulty.stdout + faulty.stderr
    assert said in faulty.stdout + faulty.stderr
    assert f"Failed: {gate}" in faulty.stdout


def test_a_changed_setting_makes_the_page_stale(tree: Path) -> None:
    path = tree / SMALL[0]
    path.write_text(path.read_text(encoding="utf-8").replace('"Port to listen on.', '"Port.'), encoding="utf-8")
    assert run_gate(tree, "docs").returncode == 1


def test_contracts_hold(whole_tree: Path) -> None:
    clean = run_gate(whole_tree, "imports")
    assert clean.returncode == 0, clean.stdout + clean.stderr


@pytest.mark.parametrize(
    ("module", "imports", "contract"),
    [
        ("server/sightline_server/engine/planted.py", "sightline_server.chat.model", "Imports point downwards"),
        ("kernels/sightline_kernels/planted.py", "sightline_models.config", "Imports point downwards"),
        ("models/sightline_models/planted.py", "sightline_server.errors", "Imports point downwards"),
        ("server/sightline_server/routes/planted.py", "torch", "import no torch"),
        ("server/sightline_server/chat/planted.py", "sightline_server.engine.runner", "import no torch"),
        ("server/sightline_server/engine/planted.py", "fastapi", "know no web framework"),
        ("models/sightline_models/planted.py", "starlette.requests", "know no web framework"),
        ("server/sightline_server/protocol/planted.py", "sightline_models.config", "pydantic only"),
        ("server/sightline_server/bench/planted.py", "sightline_server.chat.model", "plain client"),
        ("server/sightline_server/engine/planted.py", "sightline_server.engine.worker", "only ever started"),
    ],
)
def test_a_planted_import_breaks_its_contract(whole_tree: Path, module: str, imports: str, contract: str) -> None:
    planted = whole_tree / module
    planted.write_text(f"import {imports}\n", encoding="utf-8")
    try:
        faulty = run_gate(whole_tree, "imports")
    finally:
        planted.unlink()
    assert faulty.returncode == 1, faulty.stdout + faulty.stderr
    broken = [line for line in faulty.stdout.splitlines() if line.endswith("BROKEN")]
    assert any(contract in line for line in broken), faulty.stdout


def test_an_unknown_gate_is_named(tree: Path) -> None:
    answer = run_gate(tree, "planted")
    assert answer.returncode == 2
    assert "'planted'" in answer.stderr
