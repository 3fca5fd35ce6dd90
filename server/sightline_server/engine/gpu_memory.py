"""What fits under ``--gpu-memory``, beside weights and the largest step; the doctor plans with it too.

Pure arithmetic over bytes. Knows no model, no step and no torch: what these need is told.
"""

from dataclasses import dataclass

_LEAST_SLACK = 2**25
"""Torch's allocator hands out memory in pieces of its own sizes, so some of it is always held and not used."""
_SLACK_SHARE = 50


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
