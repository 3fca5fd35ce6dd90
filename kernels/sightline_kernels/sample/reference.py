"""Choosing a token: temperature, filters, then Gumbel-max over counter-based noise. Pure functions.

Knows logits and numbers. Knows nothing of requests, penalties or stop tokens. On a GPU the host reads
nothing back, so that a step can be captured in a graph with its sampling.

Shape suffixes: B rows, V vocabulary, G groups of E tokens, X places that noise is drawn for.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sightline_kernels.sample.words_on_cpu import philox_words

GROUP = 64
"""Neighbouring tokens that are first drawn as one."""

Noise = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""``gumbel_noise``, or what stands in for it."""

LARGEST_REST = 1 - 2.0**-24
"""The float32 next to 1."""

# Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF


def philox(even: Tensor, odd: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Philox4x32: four words of random bits for each counter.

    Args:
        even: int64 [2, ...], words 0 and 2 of each counter, in [0, 2**32).
        odd: int64 [2, ...], words 1 and 3.
        key: int64 [2, ...] that broadcasts against the counters, in [0, 2**32).

    Returns:
        Words 0 and 2, and words 1 and 3, of the output, shaped like the counters.
    """
    column = (2,) + (1,) * (even.dim() - 1)
    multiplier = _pair(_MULTIPLIERS, even.device).view(column)
    step = torch.arange(_ROUNDS, device=even.device).view(-1, *(1 for _ in column))
    weyl = _pair(_WEYL, even.device).view(column)
    for round_key in (key + step * weyl).unbind():
        # The product of two 32-bit words is exact in int64's 64 bits, although its sign may turn. A word's upper bits
        # are cut off only where they would matter.
        product = (even * multiplier).flip(0)
        even = product.bitwise_right_shift(32).bitwise_xor_(odd).bitwise_xor_(round_key).bitwise_and_(_MASK)
        odd = product
    return even, odd & _MASK


def _pair(numbers: tuple[int, int], device: torch.device) -> Tensor:
    """Both numbers as a tensor, made on the device: to copy them there, the host would wait for it."""
    first, second = numbers
    return torch.arange(2, device=device).mul_(second - first).add_(first)


def gumbel_noise(seed_B: Tensor, choice_B: Tensor, position_B: Tensor, places: int) -> Tensor:
    """Standard Gumbel noise [B, X = places] float32, a function of (seed, choice, position, place) alone.

    Args:
        seed_B: int64, the 64 bits of an unsigned seed.
        choice_B, position_B: int64 in [0, 2**32).
    """
    num_quads = -(-places // 4)
    if seed_B.is_cpu:
        words_BX = philox_words(seed_B, choice_B, position_B, num_quads)[:, :places]
        return _gumbel(torch.from_numpy(words_BX.astype(np.float32)))
    quads = torch.arange(num_quads, device=seed_B.device).expand(len(seed_B), num_quads)
    even = torch.stack((quads, choice_B[:, None].expand_as(quads)))
    odd = torch.stack((position_B[:, None].expand_as(quads), torch.zeros_like(quads)))
    key = torch.stack((seed_B, seed_B >> 32))[:, :, None] & _MASK
    words_02, words_13 = philox(even, odd, key)
    bits_BX = torch.stack((words_02, words_13), dim=1).flatten(0, 1).permute(1, 2, 0).flatten(1)[:, :places]
    return _gumbel(bits_BX.float())


def _gumbel(bits: Tensor) -> Tensor:
    """Noise from 32 random bits each, as float32 numbers that are ours."""
    # 1 - uniform, in (0, 1]: where it is small, float32 holds it to full precision, and there the largest noise is.
    # A whole 1, to which the last bits would round, would give minus infinity: a token as unlikely as a forbidden one.
    rest = bits.add_(0.5).mul_(2.0**-32).clamp_(max=LARGEST_REST)
    return rest.neg_().log1p_().neg_().log_().neg_()


def sample(
    logits_BV: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    seed_B: Tensor,
    choice_B: Tensor,
    position_B: Tensor,
    *,
    filtered: bool = True,
    noise: Noise = gumbel_noise,
) -> Tensor:
    """Token ids [B] int64: where the temperature is 0 the likeliest, the first of equals; elsewhere a draw from
    softmax(logits / temperature) over the tokens that the filters keep (see ``keep``).

    Args:
        logits_BV: float32, as the model gave them; -inf for a token that may not be chosen. Not modified.
        temperature_B: float32, 0 or large enough that logits over it stay finite.
        top_k_B: int64; 0 for no limit.
        top_p_B, min_p_B: float32; 1 and 0 for no limit.
        seed_B, choice_B, position_B: int64, see ``gumbel_noise``.
        filtered: False promises that no row has a filter.
        noise: ``gumbel_noise``, or what returns the same.
    """
    some_greedy = True
    # A GPU would be waited for.
    if logits_BV.is_cpu:
        temperatures = temperature_B.tolist()
        if not any(temperatures):
            return logits_BV.argmax(dim=-1)
        some_greedy = not all(temperatures)
    divisor_B1 = (temperature_B.masked_fill(temperature_B == 0, 1.0) if some_greedy else temperature_B)[:, None]
    scaled_BV = logits_BV / divisor_B1
    if filtered:
        scaled_BV.masked_fill_(~keep(logits_BV, divisor_B1, top_k_B, top_p_B, min_p_B), -torch.inf)
    drawn_B = _draw(scaled_BV, seed_B, choice_B, position_B, noise)
    if not some_greedy:
        return drawn_B
    return torch.where(temperature_B == 0, logits_BV.argmax(dim=-1), drawn_B)


def keep(logits_BV: Tensor, divisor_B1: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor) -> Tensor:
    """Which tokens all filters keep, bool [B, V]: a matter of logits, not of their order, so equals stay together.

    Top-k keeps the tokens whose logit is at least the k-th largest. Top-p (nucleus; Holtzman et al., 2020) keeps those
    for which all likelier ones that top-k left have together less probability than ``top_p``. Min-p keeps those at
    least ``min_p`` times as likely as the likeliest, which always stays.

    Args:
        divisor_B1: what logits are divided by before they are probabilities.
        top_k_B, top_p_B, min_p_B: see ``sample``.
    """
    last = logits_BV.shape[1] - 1
    # Turned round, since places are searched in ascending order: the likeliest token costs least.
    cost_BV = _sort(-logits_BV)
    scaled_BV = cost_BV / divisor_B1
    mass_BV = F.softmin(scaled_BV, dim=-1).cumsum(dim=-1)
    top_k_B1, top_p_B1 = (top_k_B - 1).masked_fill_(top_k_B <= 0, last).clamp_(max=last)[:, None], top_p_B[:, None]
    # The last of those that equal the k-th.
    equal_B1 = torch.searchsorted(cost_BV, cost_BV.gather(1, top_k_B1), right=True).sub_(1).clamp_(0, last)
    nucleus_B1 = torch.searchsorted(mass_BV, mass_BV.gather(1, equal_B1) * top_p_B1)
    # Rounded, the sum may be whole before the last token.
    nucleus_B1 = nucleus_B1.masked_fill_(top_p_B1 >= 1, last)
    most_B1 = scaled_BV[:, :1] - min_p_B[:, None].log()
    likely_B1 = torch.searchsorted(scaled_BV, most_B1, right=True).sub_(1).clamp_(min=0)
    place_B1 = torch.minimum(torch.minimum(top_k_B1, nucleus_B1), likely_B1)
    return logits_BV >= cost_BV.gather(1, place_B1).neg_()


def _sort(numbers_BV: Tensor) -> Tensor:
    """The rows of a tensor that is ours in ascending order."""
    if numbers_BV.device.type != "cpu":
        return numbers_BV.sort(dim=-1).values
    # NumPy sorts numbers alone, with vector instructions; torch sorts their places along, many times slower.
    numbers_BV.numpy().sort(axis=-1)
    return numbers_BV


def _draw(logits_BV: Tensor, seed_B: Tensor, choice_B: Tensor, position_B: Tensor, noise: Noise) -> Tensor:
    """A draw from softmax(logits), by Gumbel-max in two steps: first of a group of neighbouring tokens by its total
    probability, then of a token in it. The same distribution from far less noise than one number a token.
    """
    num_rows, vocab_size = logits_BV.shape
    num_groups = -(-vocab_size // GROUP)
    padding = num_groups * GROUP - vocab_size
    padded_BV = F.pad(logits_BV, (0, padding), value=-torch.inf) if padding else logits_BV
    logits_BGE = padded_BV.reshape(num_rows, -1, GROUP)
    noise_BX = noise(seed_B, choice_B, position_B, num_groups + GROUP)
    # Groups too unlikely for float32 get no probability: no noise is large enough that they would be drawn.
    share_BG = padded_BV.softmax(dim=-1).view_as(logits_BGE).sum(dim=-1)
    group_B = (share_BG.log_() + noise_BX[:, :num_groups]).argmax(dim=-1)
    chosen_BE = logits_BGE.gather(1, group_B[:, None, None].expand(-1, 1, GROUP))[:, 0]
    return group_B * GROUP + (chosen_BE + noise_BX[:, num_groups:]).argmax(dim=-1)
