"""The paged key/value cache: two tensors, the order they lie in and their byte arithmetic.

Knows blocks and slots. Keeps no books: who owns which block is the engine's business.
Suffixes: L layers, N blocks, P slots a block, G key/value heads, D head dim.
"""

import contextlib
import math
import mmap
from dataclasses import dataclass

import torch
from torch import Tensor

from sightline_models.config import DecoderConfig


@dataclass
class KvPool:
    k_LNPGD: Tensor
    v_LNPGD: Tensor

    @classmethod
    def allocate(
        cls,
        config: DecoderConfig,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
        heads_apart: bool = False,
    ) -> "KvPool":
        """A zeroed pool: slots never written are read, masked, beside written ones, so they must hold numbers.

        With ``heads_apart``, on a CPU, a block's keys of one head lie next to each other, as attention reads them, and
        the pool on large pages: its blocks are so many and so far apart that looking their pages up takes long.
        Raises RuntimeError or OSError where there is not that much memory.
        """
        if heads_apart:
            assert device.type == "cpu", f"heads are kept apart on a CPU, and this is {device}"
            shape = (config.num_layers, num_blocks, config.num_kv_heads, block_size, config.head_dim)
            return cls(*(_on_large_pages(shape, dtype).transpose(2, 3) for _ in range(2)))
        shape = (config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    @staticmethod
    def bytes_per_block(config: DecoderConfig, *, block_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block takes over all layers, keys and values together."""
        numbers_per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        return block_size * numbers_per_token * dtype.itemsize


def _on_large_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Zeros in memory that is the machine's own, on pages of 2 MiB where the kernel has some."""
    # Private: what may be shared is on small pages whatever it wishes for.
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Elsewhere than on Linux there is no such wish, and a kernel may be built without.
    with contextlib.suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=dtype).view(shape)
