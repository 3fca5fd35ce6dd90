"""What ``--gpu-memory`` comes to: a limit that torch keeps, and the cache that fits under it beside all else.

Knows bytes and a GPU's memory. Knows no model and no step: what these need is told.
"""

import logging
from dataclasses import dataclass

import torch

from sightline_server.settings import SettingsError

log = logging.getLogger(__name__)

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


def limit_memory(limit: int, device: torch.device) -> None:
    """Hold torch to ``limit`` bytes on ``device`` from now on; 0 is no limit. Call before anything is put there."""
    if not limit:
        return
    if device.type != "cuda":
        log.warning("--gpu-memory has no effect without a GPU; --cpu-cache-gb sizes the cache")
        return
    total = torch.cuda.mem_get_info(device)[1]
    if limit > total:
        raise SettingsError(f"--gpu-memory {gib(limit)} is more than the {gib(total)} of {device}: lower it.")
    torch.cuda.set_per_process_memory_fraction(limit / total, device)


def slack(limit: int) -> int:
    """Bytes of ``limit`` that are left alone."""
    return max(_LEAST_SLACK, limit // _SLACK_SHARE)


def room_for_cache(limit: int, free: int, needs: Needs) -> int:
    """Bytes for the cache under ``limit`` and in what is ``free``, the weights being there and nothing else.

    Raises SettingsError, saying what is needed, when that is too little for one request.
    """
    under_limit = limit - slack(limit) - needs.beside_cache
    in_free = free - slack(limit) - needs.step - needs.encoder_cache
    room = min(under_limit, in_free)
    if room < needs.smallest_cache:
        needed = needs.beside_cache + needs.smallest_cache
        # What is left alone grows with the limit.
        wanted = max(needed + _LEAST_SLACK, needed * _SLACK_SHARE // (_SLACK_SHARE - 1) + 1)
        parts = (
            f"weights {gib(needs.weights)}, the largest step {gib(needs.step)}, the encoder cache "
            f"{gib(needs.encoder_cache)} and a cache for one request {gib(needs.smallest_cache)}"
        )
        if under_limit >= needs.smallest_cache:
            raise SettingsError(
                f"--gpu-memory {gib(limit)}: the GPU has {gib(free)} free beside our weights, too little for "
                f"{parts}. End what else runs there, or use --quantize nf4."
            )
        raise SettingsError(
            f"--gpu-memory {gib(limit)} is too little: {parts} take {gib(wanted)}. Raise it to "
            f"{-(-wanted // 2**20)}MiB, use --quantize nf4, or lower --max-step-tokens, --max-running or "
            "--encoder-cache-mb."
        )
    if in_free < under_limit:
        log.warning("the GPU has only %s free: the cache is smaller than --gpu-memory allows", gib(free))
    return room


def gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB"
