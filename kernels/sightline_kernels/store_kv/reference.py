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
    num_slots = k_cache_NPGD.shape[0] * k_cache_NPGD.shape[1]
    k_cache_NPGD.view(num_slots, *k_TGD.shape[1:]).index_copy_(0, slots_T, k_TGD)
    v_cache_NPGD.view(num_slots, *v_TGD.shape[1:]).index_copy_(0, slots_T, v_TGD)
