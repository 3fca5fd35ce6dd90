"""Sequences in a paged cache, without an engine: layouts for prefills and decodes of chosen lengths.

Knows blocks and lengths. Knows nothing of weights or of time. Blocks are dealt out shuffled, as a busy server's are.
"""

import torch
from torch import Tensor

from sightline_kernels.layout import PagedLayout
from sightline_models.config import DecoderConfig
from sightline_models.kv import KvPool


class PagedSequences:
    """``num_sequences`` sequences of up to ``max_len`` tokens each, and the cache that holds them."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        num_sequences: int,
        max_len: int,
        dtype: torch.dtype,
        device: str,
        block_size: int = 16,
    ) -> None:
        self.block_size = block_size
        self.device = torch.device(device)
        blocks_each = -(-max_len // block_size)
        num_blocks = num_sequences * blocks_each
        self.kv = KvPool.allocate(config, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=self.device)
        dealt = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(0))
        self._table_BN = dealt.view(num_sequences, blocks_each).to(torch.int32)

    def fill(self, seed: int = 0) -> None:
        """Put random keys and values everywhere, as if every sequence had been computed."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        self.kv.k_LNPGD.normal_(generator=generator)
        self.kv.v_LNPGD.normal_(generator=generator)

    def layout(self, query_lens: tuple[int, ...], context_lens: tuple[int, ...]) -> tuple[PagedLayout, Tensor]:
        """The layout of one step and its positions_T; the sequences with one query must stand first."""
        ends = torch.tensor(query_lens).cumsum(0)
        positions = [
            torch.arange(context - queries, context) for queries, context in zip(query_lens, context_lens, strict=True)
        ]
        slots = [
            self._table_BN[row].long()[at // self.block_size] * self.block_size + at % self.block_size
            for row, at in enumerate(positions)
        ]
        num_decodes = next((row for row, queries in enumerate(query_lens) if queries > 1), len(query_lens))
        layout = PagedLayout(
            block_table_BN=self._table_BN[: len(query_lens)].to(self.device),
            cu_seqlens_B1=torch.cat([torch.zeros(1, dtype=torch.long), ends]).to(self.device, torch.int32),
            context_len_B=torch.tensor(context_lens, dtype=torch.int32).to(self.device),
            slots_T=torch.cat(slots).to(self.device),
            query_lens=query_lens,
            context_lens=context_lens,
            num_decodes=num_decodes,
            block_size=self.block_size,
        )
        return layout, torch.cat(positions).to(self.device)
