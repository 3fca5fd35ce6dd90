"""Bounds of a step that settings leave open: for the engine, and for the doctor, which plans without torch."""

from sightline_models.config import VlmConfig
from sightline_server.settings import Settings

_STEP_TOKENS_OF_GPU, _STEP_TOKENS_OF_CPU = 2048, 512
_MIXED_TOKENS_OF_GPU = 512


def step_tokens(settings: Settings, *, on_gpu: bool) -> int:
    """Most tokens of one step."""
    return settings.max_step_tokens or (_STEP_TOKENS_OF_GPU if on_gpu else _STEP_TOKENS_OF_CPU)


def mixed_step_tokens(settings: Settings, *, on_gpu: bool) -> int:
    """Most prompt tokens of a step that continues answers too."""
    return settings.mixed_step_tokens or (_MIXED_TOKENS_OF_GPU if on_gpu else step_tokens(settings, on_gpu=False))


def running_requests(settings: Settings, *, on_gpu: bool) -> int:
    """Most requests computed at once: every one of them gets a token a step."""
    return min(settings.max_running, step_tokens(settings, on_gpu=on_gpu))


def images_per_step(config: VlmConfig, max_step_tokens: int) -> int:
    """As many images as a step's tokens could hold, and two for a prompt that begins and one that ends in it."""
    return max_step_tokens // config.num_image_tokens + 2
