"""Rotary position embedding in the half-split convention, in plain torch.

Dimension ``i`` of a head turns with dimension ``i + D/2``. Knows angles, not positions.
Suffixes: T packed tokens, H query heads, G key heads, D head dim.
"""

from torch import Tensor


def apply_rotary(q_THD: Tensor, k_TGD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Return queries and keys turned by their tokens' angles.

    ``cos_TD`` repeats the D/2 cosines in both halves; ``sin_TD`` holds the negated sines in its first half and the
    sines in its second, so that one multiply-add by the swapped halves does the turn.
    """
    cos_T1D, sin_T1D = cos_TD.unsqueeze(1), sin_TD.unsqueeze(1)
    if q_THD.is_cpu and _stand_together(q_THD, k_TGD):
        # Each operation costs more there than turning the heads of a few tokens does.
        num_tokens, num_heads, head_dim = q_THD.shape
        both_TXD = q_THD.as_strided((num_tokens, num_heads + k_TGD.shape[1], head_dim), q_THD.stride())
        turned_TXD = _turn(both_TXD, cos_T1D, sin_T1D)
        return turned_TXD[:, :num_heads], turned_TXD[:, num_heads:]
    return _turn(q_THD, cos_T1D, sin_T1D), _turn(k_TGD, cos_T1D, sin_T1D)


def _turn(x_THD: Tensor, cos_T1D: Tensor, sin_T1D: Tensor) -> Tensor:
    swapped_THD = x_THD.roll(x_THD.shape[-1] // 2, dims=-1)
    return (x_THD * cos_T1D).addcmul_(swapped_THD, sin_T1D)


def _stand_together(q_THD: Tensor, k_TGD: Tensor) -> bool:
    """Whether both are views of one tensor in which a token's key heads follow its query heads."""
    num_heads, stride = q_THD.shape[1], q_THD.stride()
    return k_TGD.stride() == stride and k_TGD.data_ptr() == q_THD.data_ptr() + num_heads * stride[1] * q_THD.itemsize
