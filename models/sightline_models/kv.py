"""The paged key/value cache: two tensors and their byte arithmetic.

Knows blocks and slots. Keeps no books: who owns which block is the engine's business.
Suffixes: L layers, N blocks, P slots a block, G key/value heads, D head dim.
"""

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
    ) -> "KvPool":
        """A zeroed pool: slots never written are read, masked, beside written ones, so they must hold numbers."""
        shape = (config.num_layers, num_blocks, block_size, config.num_kv_heads, config.head_dim)
        return cls(torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device))

    @staticmethod
    def bytes_per_block(config: DecoderConfig, *, block_size: int, dtype: torch.dtype) -> int:
        """Bytes that one block takes over all layers, keys and values together."""
        numbers_per_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim
        return block_size * numbers_per_token * dtype.itemsize
