"""A demo model with random weights, small enough that a test can afford it, and its tokenizer."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from sightline_models.demo import network
from sightline_models.demo.export import export
from sightline_models.demo.network import Shape, Weights
from sightline_models.demo.text import Codec, train_tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer()


@pytest.fixture(scope="session")
def codec(tokenizer: Tokenizer) -> Codec:
    return Codec(tokenizer)


@pytest.fixture(scope="session")
def small() -> Shape:
    """Two layers in each half, pictures of 4 x 4 patches."""
    return Shape(
        vocab_size=1408, width=32, heads=2, image_size=32, tower_layers=2, tower_mlp=48, decoder_layers=2,
        decoder_mlp=40,
    )  # fmt: skip


@pytest.fixture(scope="session")
def small_weights(small: Shape) -> Weights:
    """Random weights that bfloat16 holds exactly, norms and biases included."""
    generator = torch.Generator().manual_seed(3)
    weights = network.initial_weights(small, generator)
    moved = {name: value + 0.2 * torch.randn(value.shape, generator=generator) for name, value in weights.items()}
    chosen = {name: moved[name] if value.ndim == 1 else value for name, value in weights.items()}
    return {name: value.bfloat16().float() for name, value in chosen.items()}


@pytest.fixture(scope="session")
def small_checkpoint(
    small: Shape, small_weights: Weights, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("small") / "checkpoint"
    export(small_weights, small, tokenizer, folder)
    return folder
