"""A tiny model for tests that drive an engine."""

from pathlib import Path

import pytest
import torch
from engines import CLIP, RECORDABLE

from sightline_kernels.dispatch import REFERENCES, Kernels
from sightline_models.config import read_config
from sightline_models.presets import write_preset
from sightline_models.vlm import Vlm
from sightline_models.weights import random_vlm


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
