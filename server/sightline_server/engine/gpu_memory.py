"""Arithmetic over a GPU's memory: which recordings are made and what they keep, and what a limit leaves for the cache.

The doctor plans with it. Imports no torch: what weights and the largest step need is told.
"""

from dataclasses import dataclass

from sightline_models.config import VlmConfig

_LEAST_SLACK = 2**25
"""Torch's allocator hands out memory in pieces of its own sizes, so some of it is always held and not used."""
_SLACK_SHARE = 50


BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
"""A decode step takes the next larger recording: the finer, the less is computed in vain, and the more are recorded."""
MOST_IMAGES = 8
"""Image batches up to this size are recorded, each size exactly: padding would cost as much as a picture."""
_DRIVER_BYTES = 2**28
"""Set aside for what the driver keeps of all recordings. An estimate, never measured."""


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Bytes, beside the cache that is to be sized."""

    weights: int
    step: int
    encoder_cache: int
    smallest_cache: int
    """The least that serves a request."""

    @property
    def beside_cache(self) -> int:
        return self.weights + self.step + self.encoder_cache


def batch_sizes(most: int) -> list[int]:
    """The batch sizes that are recorded for at most ``most`` running requests."""
    largest = min(most, BATCH_SIZES[-1])
    return [*(size for size in BATCH_SIZES if size < largest), largest]


def bytes_of_recordings(config: VlmConfig, *, max_running: int, max_images: int, decodes: bool) -> int:
    """What recordings keep for themselves, estimated from shapes in half precision.

    Args:
        max_images: in one step.
        decodes: whether decode steps are recorded, or pictures alone.
    """
    decoder, tower = config.decoder, config.vision
    images = min(max_images, MOST_IMAGES)
    pixels = 3 * tower.image_size**2 * sum(range(1, images + 1))
    # Each recording's result stays where it is.
    kept = 2 * config.num_image_tokens * decoder.hidden_size * sum(range(1, images + 1))
    encoded = kept + 2 * images * (tower.num_patches + 1) * (tower.intermediate_size + 6 * tower.hidden_size)
    if not decodes:
        return pixels + encoded + _DRIVER_BYTES
    sizes = batch_sizes(max_running)
    hidden = 2 * sizes[-1] * (3 * decoder.intermediate_size + 8 * decoder.hidden_size)
    # Of many rows, a quantized matrix is made whole.
    whole = 2 * 2 * decoder.intermediate_size * decoder.hidden_size
    # Each recording's logits stay where they are, in float32.
    return pixels + encoded + hidden + whole + 4 * decoder.vocab_size * sum(sizes) + _DRIVER_BYTES


def slack(limit: int) -> int:
    """Bytes of ``limit`` that are left alone."""
    return max(_LEAST_SLACK, limit // _SLACK_SHARE)


def room_for_cache(limit: int, free: int, needs: Needs) -> int:
    """Bytes for the cache under ``limit`` and in what is ``free`` once the weights are there; may be below none."""
    return min(limit - needs.beside_cache, free - needs.step - needs.encoder_cache) - slack(limit)


def why_too_little(limit: int, free: int, needs: Needs) -> str | None:
    """Why there isn't room for one request, and what would make some; None when there is."""
    if room_for_cache(limit, free, needs) >= needs.smallest_cache:
        return None
    parts = (
        f"weights {gib(needs.weights)}, the largest step {gib(needs.step)}, the encoder cache "
        f"{gib(needs.encoder_cache)} and a cache for one request {gib(needs.smallest_cache)}"
    )
    if limit - needs.beside_cache - slack(limit) >= needs.smallest_cache:
        return (
            f"--gpu-memory {gib(limit)}: the GPU has {gib(free)} free beside our weights, too little for {parts}. End "
            "what else runs there, or use --quantize nf4."
        )
    needed = needs.beside_cache + needs.smallest_cache
    # What is left alone grows with the limit.
    wanted = max(needed + _LEAST_SLACK, needed * _SLACK_SHARE // (_SLACK_SHARE - 1) + 1)
    return (
        f"--gpu-memory {gib(limit)} is too little: {parts} take {gib(wanted)}. Raise it to {-(-wanted // 2**20)}MiB, "
        "use --quantize nf4, or lower --max-step-tokens, --max-running or --encoder-cache-mb."
    )


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
