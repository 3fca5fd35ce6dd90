"""Where the rows of one packed step live in the paged cache.

Knows block tables and offsets. Knows nothing of requests, models or text.

Shape suffixes, here and in every kernel: T packed query tokens of the step, B sequences, N blocks a sequence
(padded), P slots a block, H query heads, G key/value heads, D head dim, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class PagedLayout:
    """The attention geometry of one step.

    Sequences stand in the packed token axis one after another; the first ``num_decodes`` of them have exactly one
    query token. The queries of sequence ``b`` are the last ``query_lens[b]`` of its ``context_lens[b]`` tokens.
    """

    block_table_BN: Tensor
    """int32 [B, N]: cache block of each run of ``block_size`` positions; entries past the context are 0."""
    cu_seqlens_B1: Tensor
    """int32 [B + 1]: where each sequence's queries start in the T axis."""
    context_len_B: Tensor
    """int32 [B]: tokens in the cache once this step's keys are stored, the queries included."""
    slots_T: Tensor
    """int64 [T]: flat cache slot (block * block_size + offset) each token's key and value go to."""
    query_lens: tuple[int, ...]
    """Host copy of the query counts."""
    context_lens: tuple[int, ...]
    """Host copy of ``context_len_B``."""
    num_decodes: int
    block_size: int
    row_invariant: bool = False
    """Compute every query row by arithmetic whose shape depends on its own position alone (``--deterministic``)."""
    memo: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)
    """What a kernel derived from this geometry in the step's first layer, for the later ones."""
