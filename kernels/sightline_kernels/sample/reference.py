"""Choosing a token: filters, then Gumbel-max over counter-based noise. Pure functions of their arguments.

Knows logits and numbers. Knows nothing of requests, penalties or stop tokens.

Shape suffixes: B rows, V vocabulary, G groups of E tokens, X places that noise is drawn for.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

GROUP = 64
"""Neighbouring tokens that are first drawn as one."""

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
    for round_key in ((key + step * weyl) & _MASK).unbind():
        # The product of two 32-bit words is exact in int64's 64 bits, although its sign may turn.
        product = (even * multiplier).flip(0)
        even = (product >> 32).bitwise_and_(_MASK).bitwise_xor_(odd).bitwise_xor_(round_key)
        odd = product.bitwise_and_(_MASK)
    return even, odd


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
    quads = torch.arange(num_quads, device=seed_B.device).expand(len(seed_B), num_quads)
    even = torch.stack((quads, choice_B[:, None].expand_as(quads)))
    odd = torch.stack((position_B[:, None].expand_as(quads), torch.zeros_like(quads)))
    key = torch.stack((seed_B, seed_B >> 32))[:, :, None] & _MASK
    words_02, words_13 = philox(even, odd, key)
    bits_BX = torch.stack((words_02, words_13), dim=1).flatten(0, 1).permute(1, 2, 0).flatten(1)[:, :places]
    # 1 - uniform, in (0, 1]: where it is small, float32 holds it to full precision, and there the largest noise is.
    rest_BX = (bits_BX.float() + 0.5).mul_(2.0**-32)
    return rest_BX.neg_().log1p_().neg_().log_().neg_()


def filter_logits(logits_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor, min_p_B: Tensor) -> Tensor:
    """Logits with the tokens outside top-k, top-p (nucleus) or min-p at -inf; the most likely token always stays.

    Top-p keeps the smallest set of most likely tokens whose probability reaches ``top_p`` (Holtzman et al., 2020);
    min-p keeps tokens at least ``min_p`` times as likely as the most likely one. Both look at what top-k left.

    Args:
        logits_BV: float32, temperature already applied.
        top_k_B: int64, 0 for no limit.
        top_p_B, min_p_B: float32.
    """
    vocab_size = logits_BV.shape[1]
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    rank_1V = torch.arange(vocab_size, device=logits_BV.device)[None, :]
    limit_B1 = torch.where(top_k_B > 0, top_k_B, vocab_size)[:, None]
    sorted_BV = sorted_BV.masked_fill(rank_1V >= limit_B1, -torch.inf)
    probability_BV = sorted_BV.softmax(dim=-1)
    before_BV = probability_BV.cumsum(dim=-1) - probability_BV
    drop_BV = (before_BV >= top_p_B[:, None]) | (probability_BV < min_p_B[:, None] * probability_BV[:, :1])
    drop_BV[:, 0] = False
    sorted_BV = sorted_BV.masked_fill(drop_BV, -torch.inf)
    return torch.empty_like(sorted_BV).scatter_(1, order_BV, sorted_BV)


def draw(logits_BV: Tensor, temperature_B: Tensor, seed_B: Tensor, choice_B: Tensor, position_B: Tensor) -> Tensor:
    """Token ids [B] int64: argmax where the temperature is 0, a draw from softmax(logits) elsewhere.

    The draw is Gumbel-max in two steps, first of a group of neighbouring tokens by its total probability, then of a
    token in it: the same distribution from far less noise than one number a token.

    Args:
        logits_BV: float32, temperature and filters applied.
        temperature_B: float32; only whether it is 0 matters here.
        seed_B, choice_B, position_B: see ``gumbel_noise``.
    """
    num_rows, vocab_size = logits_BV.shape
    num_groups = -(-vocab_size // GROUP)
    logits_BGE = F.pad(logits_BV, (0, num_groups * GROUP - vocab_size), value=-torch.inf).view(num_rows, -1, GROUP)
    noise_BX = gumbel_noise(seed_B, choice_B, position_B, num_groups + GROUP)
    group_B = (logits_BGE.logsumexp(dim=-1) + noise_BX[:, :num_groups]).argmax(dim=-1)
    chosen_BE = logits_BGE.gather(1, group_B[:, None, None].expand(-1, 1, GROUP))[:, 0]
    drawn_B = group_B * GROUP + (chosen_BE + noise_BX[:, num_groups:]).argmax(dim=-1)
    return torch.where(temperature_B == 0, logits_BV.argmax(dim=-1), drawn_B)


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
) -> Tensor:
    """Token ids [B] int64, each a function of its row alone: temperature, filters, then a draw.

    Args:
        logits_BV: float32, as the model gave them. Not modified.
        temperature_B: float32; 0 takes the likeliest token.
        top_k_B, top_p_B, min_p_B: see ``filter_logits``.
        seed_B, choice_B, position_B: see ``gumbel_noise``.
        filtered: False when it is known that no row has a filter.
    """
    scaled_BV = logits_BV / torch.where(temperature_B == 0, 1.0, temperature_B)[:, None]
    if filtered:
        scaled_BV = filter_logits(scaled_BV, top_k_B, top_p_B, min_p_B)
    return draw(scaled_BV, temperature_B, seed_B, choice_B, position_B)
