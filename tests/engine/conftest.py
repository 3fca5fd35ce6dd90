"""A tiny model for tests that drive an engine."""

from pathlib import Path

import pytest
import torch
from engines import CLIP

from sightline_models.config import read_config
from sightline_models.presets import write_preset
from sightline_models.vlm import Vlm
from sightline_models.weights import random_vlm


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Vlm:
    """Random weights of the smallest preset, float32."""
    folder: Path = tmp_path_factory.mktemp("tiny")
    write_preset("tiny", folder)
    return random_vlm(read_config(folder), CLIP, dtype=torch.float32, device=torch.device("cpu"), seed=1)
