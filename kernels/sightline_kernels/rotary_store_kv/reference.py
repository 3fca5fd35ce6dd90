"""Turns a step's queries and keys by their positions and writes keys and values to their slots, in plain torch.

The two references one after the other. Knows nothing of sequences or attention. Suffixes as in ``layout.py``.
"""

from torch import Tensor

from sightline_kernels.rotary.reference import apply_rotary
from sightline_kernels.store_kv.reference import store_kv


def rotary_store_kv(
    q_THD: Tensor,
    k_TGD: Tensor,
    v_TGD: Tensor,
    cos_TD: Tensor,
    sin_TD: Tensor,
    k_cache_NPGD: Tensor,
    v_cache_NPGD: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """Return the turned queries; the turned keys, and the values as they are, go to ``slots_T`` of the caches."""
    q_THD, k_TGD = apply_rotary(q_THD, k_TGD, cos_TD, sin_TD)
    store_kv(k_TGD, v_TGD, k_cache_NPGD, v_cache_NPGD, slots_T)
    return q_THD
