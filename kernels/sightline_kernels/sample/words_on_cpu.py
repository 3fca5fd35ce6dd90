"""The counter-based random bits of ``reference.py`` on a CPU, in NumPy's 32-bit words.

There a draw's cost is the number of its small operations, not of its numbers: these are a third of torch's. Knows
counters and keys. Knows nothing of noise or tokens. Suffixes: B rows, Q quads of words.
"""

import sys
from typing import Any

import numpy as np
from torch import Tensor

_MULTIPLIERS = np.array((0xD2511F53, 0xCD9E8D57), np.uint64)[:, None, None]
_KEY_STEPS = np.arange(10, dtype=np.uint32)[:, None, None] * np.array((0x9E3779B9, 0xBB67AE85), np.uint32)[:, None]
# Where the lower and the upper word of 64 bits lie.
_LOWER, _UPPER = (0, 1) if sys.byteorder == "little" else (1, 0)


def philox_words(
    seed_B: Tensor, choice_B: Tensor, position_B: Tensor, num_quads: int
) -> np.ndarray[Any, np.dtype[np.uint32]]:
    """Philox4x32-10 of the counters (quad, position, choice, 0) under the seeds: uint32 [B, 4 * num_quads].

    Args:
        seed_B: int64, the 64 bits of an unsigned seed.
        choice_B, position_B: int64 in [0, 2**32).
    """
    shape = (2, len(seed_B), num_quads)
    seed_B2 = np.ascontiguousarray(seed_B.numpy()).view(np.uint32).reshape(-1, 2)
    keys = _KEY_STEPS + np.stack((seed_B2[:, _LOWER], seed_B2[:, _UPPER]))
    even = np.empty(shape, np.uint32)
    even[0], even[1] = np.arange(num_quads), choice_B.numpy()[:, None]
    odd = np.zeros(shape, np.uint32)
    odd[0] = position_B.numpy()[:, None]
    for key in keys[..., None]:
        # One multiplication gives both halves of each product; they are read where they lie.
        halves = np.multiply(even, _MULTIPLIERS, dtype=np.uint64)[::-1].view(np.uint32).reshape(*shape, 2)
        even = halves[..., _UPPER] ^ odd
        even ^= key
        odd = halves[..., _LOWER]
    words = np.stack((even, odd), axis=-1)
    return words.transpose(1, 2, 0, 3).reshape(len(seed_B), -1)
