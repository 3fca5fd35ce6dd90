"""A tiny model for tests that drive an engine, and engine processes for those that end them."""

import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from engines import CLIP, RECORDABLE
from supervised import FAST, MakeEngine, python_path

from sightline_kernels.dispatch import REFERENCES, Kernels
from sightline_models.config import read_config
from sightline_models.presets import write_preset
from sightline_models.vlm import Vlm
from sightline_models.weights import random_vlm
from sightline_server.engine.client import EngineProcess
from sightline_server.settings import Settings


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Vlm:
    """Random weights of the smallest preset, float32."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    return _tiny(folder, REFERENCES)


@pytest.fixture(scope="session")
def recordable(tmp_path_factory: pytest.TempPathFactory) -> Vlm:
    """The same weights, with attention that a recording can hold."""
    return _tiny(tmp_path_factory.mktemp("recordable"), RECORDABLE)


def _tiny(folder: Path, kernels: Kernels) -> Vlm:
    write_preset("tiny", folder)
    cpu = torch.device("cpu")
    return random_vlm(read_config(folder), CLIP, dtype=torch.float32, device=cpu, seed=1, kernels=kernels)


@pytest.fixture
async def make_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[MakeEngine]:
    """Engines by the name of their factory in ``worker_engines``; all closed at the end, nothing left behind."""
    monkeypatch.setenv("PYTHONPATH", python_path())
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    made: list[EngineProcess] = []

    def make(factory: str, settings: Settings | None = None, **options: Any) -> EngineProcess:
        options.setdefault("policy", FAST)
        folder = options.pop("folder", tmp_path)
        engine = EngineProcess(folder, settings or Settings(), factory=f"worker_engines:{factory}", **options)
        made.append(engine)
        return engine

    # Servers that other tests share live on.
    before = set(psutil.Process().children())
    yield make
    for engine in made:
        await engine.close()
        assert engine.pid is None
    assert not list(scratch.iterdir()), "a socket's folder was left behind"
    assert set(psutil.Process().children()) <= before, "an engine process was left behind"
