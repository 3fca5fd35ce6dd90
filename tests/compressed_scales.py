"""Scales of NF4 compressed as bitsandbytes compresses them, for tests: nothing that ships does this.

The 8-bit dynamic type is Dettmers' (arXiv 1511.04561). Suffixes as in ``nf4_linear/reference.py``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline_kernels.nf4_linear.reference import CompressedScales

SCALE_GROUP = 256
"""Scales that share a scale of their own once they are compressed."""

# bitsandbytes compresses scales by a table of this many places between -1 and 1.
_PLACES = 65535


def dynamic_map() -> Tensor:
    """The 256 numbers of the signed 8-bit dynamic type, float32, rising: fewer digits the smaller the magnitude."""
    numbers = [0.0, 1.0]
    for exponent in range(7):
        edges = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2
        power = 10.0 ** (exponent - 6)
        numbers += (power * middles).tolist() + (-power * middles).tolist()
    return torch.tensor(sorted(numbers), dtype=torch.float32, device="cpu")


def compress_scales(absmax_K: Tensor) -> CompressedScales:
    """The scales less their mean, by the dynamic type, in groups of ``SCALE_GROUP``."""
    offset = absmax_K.mean()
    count = absmax_K.numel()
    groups = -(-count // SCALE_GROUP)
    centred_CG = F.pad(absmax_K - offset, (0, groups * SCALE_GROUP - count)).view(groups, SCALE_GROUP)
    absmax_C = centred_CG.abs().amax(dim=1)
    scaled_CG = (centred_CG * (1.0 / absmax_C)[:, None]).clamp_(-1.0, 1.0)
    # As bitsandbytes does on a CPU: to the nearest place of a table, then to that place's nearest number.
    places_CG = ((scaled_CG + 1.0) * (0.5 * _PLACES) + 0.5).floor_()
    map_P = dynamic_map().to(absmax_K.device)
    codes_CG = torch.bucketize(-1.0 + 2.0 * places_CG / _PLACES, (map_P[:-1] + map_P[1:]) / 2).to(torch.uint8)
    codes_CG[absmax_C == 0] = 0
    return CompressedScales(codes_CG.view(-1)[:count], map_P, absmax_C, offset.repeat(groups), SCALE_GROUP)
