"""The draw without filters, written for torch's compiler: few passes over the logits, and noise that is given.

The same tokens as ``reference.sample`` but for near ties, whose numbers it rounds in another order. Suffixes as there.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sightline_kernels.sample.reference import GROUP


def num_places(vocab_size: int) -> int:
    """How many numbers of noise a row takes."""
    return -(-vocab_size // GROUP) + GROUP


def draw(logits_BV: Tensor, temperature_B: Tensor, noise_BX: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens [B] int64, and of each row the largest of what it is drawn from [B].

    The latter is a NaN if any logit is one, and infinite if one is or no token is allowed.

    Args:
        logits_BV: float32; -inf for a token that may not be chosen.
        temperature_B: float32; 0 for the likeliest token, the first of equals.
        noise_BX: ``reference.gumbel_noise`` of ``num_places``; rows of temperature 0 leave it unread.
    """
    num_groups = noise_BX.shape[1] - GROUP
    is_greedy_B1 = (temperature_B == 0)[:, None]
    scaled_BV = logits_BV / torch.where(is_greedy_B1, 1.0, temperature_B[:, None])
    scaled_BV = F.pad(scaled_BV, (0, num_groups * GROUP - logits_BV.shape[1]), value=-torch.inf)
    scaled_BGE = scaled_BV.view(-1, num_groups, GROUP)
    peak_BG = scaled_BGE.amax(-1)
    largest_B = peak_BG.amax(-1)
    share_BG = (scaled_BGE - largest_B[:, None, None]).exp().sum(-1)
    noise_BX = torch.where(is_greedy_B1, 0.0, noise_BX)
    group_B = (torch.where(is_greedy_B1, peak_BG, share_BG.log()) + noise_BX[:, :num_groups]).argmax(-1)
    chosen_BE = scaled_BGE.gather(1, group_B[:, None, None].expand(-1, 1, GROUP))[:, 0]
    return group_B * GROUP + (chosen_BE + noise_BX[:, num_groups:]).argmax(-1), largest_B
