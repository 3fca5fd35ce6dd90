"""Sampling noise for rows that are drawn again and again on a CPU, each time one position further.

Noise is known beforehand, and a CPU makes that of many positions in little more time than that of one. Bit for bit
what ``reference.gumbel_noise`` gives. Suffixes: B rows, A positions ahead, X places.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from sightline_kernels.sample.reference import gumbel_noise

_MOST_ROWS = 32
"""Rows of noise made at once: more than these cost as much each as they would alone."""


class NoiseAhead:
    """Stands in for ``reference.gumbel_noise`` on a CPU, for one stream of steps."""

    def __init__(self) -> None:
        self._rows_3B: np.ndarray[Any, np.dtype[np.int64]] = np.empty((3, 0), np.int64)
        self._noise_ABX = torch.empty(0, 0, 0)

    def __call__(self, seed_B: Tensor, choice_B: Tensor, position_B: Tensor, places: int) -> Tensor:
        """What ``gumbel_noise`` returns: [B, X = places]. Not to be written to."""
        rows_3B = np.stack((seed_B.numpy(), choice_B.numpy(), position_B.numpy()))
        follows, ahead = False, len(self._noise_ABX)
        if rows_3B.shape == self._rows_3B.shape and places == self._noise_ABX.shape[2]:
            moved_3B = rows_3B - self._rows_3B
            steps = int(moved_3B[2, 0])
            follows = 0 <= steps <= ahead and not moved_3B[:2].any() and bool((moved_3B[2] == steps).all())
            if follows and steps < ahead:
                return self._noise_ABX[steps]
        # Rows that didn't follow one another once may not do so again.
        ahead = max(1, _MOST_ROWS // len(seed_B)) if follows else 1
        self._rows_3B = rows_3B
        self._noise_ABX = _noise(seed_B, choice_B, position_B, places, ahead)
        return self._noise_ABX[0]


def _noise(seed_B: Tensor, choice_B: Tensor, position_B: Tensor, places: int, ahead: int) -> Tensor:
    positions_AB = position_B + torch.arange(ahead)[:, None]
    noise = gumbel_noise(seed_B.repeat(ahead), choice_B.repeat(ahead), positions_AB.flatten(), places)
    return noise.view(ahead, -1, places)
