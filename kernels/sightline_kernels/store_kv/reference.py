"""Writes a step's keys and values to their cache slots, in plain torch.

Knows slots. Knows nothing of sequences or attention. Suffixes as in ``layout.py``.
"""

from torch import Tensor


def store_kv(
    k_TGD: Tensor,
    v_TGD: Tensor,
    k_cache_NPGD: Tensor,
    v_cache_NPGD: Tensor,
    slots_T: Tensor,
) -> None:
    """Copy row ``t`` to flat slot ``slots_T[t]`` (block * block_size + offset) of both caches, in place."""
    block_size = k_cache_NPGD.shape[1]
    where = (slots_T // block_size, slots_T % block_size)
    k_cache_NPGD.index_put_(where, k_TGD)
    v_cache_NPGD.index_put_(where, v_TGD)
