"""Choosing a token: filters, then Gumbel-max over counter-based noise. Pure functions of their arguments.

Knows logits and numbers. Knows nothing of requests, penalties or stop tokens.

Shape suffixes: B rows, V vocabulary.
"""

import torch
from torch import Tensor

# Philox4x32-10: Salmon, Moraes, Dror, Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_MASK = 0xFFFFFFFF


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor], rounds: int = 10
) -> list[Tensor]:
    """Philox4x32: four words of random bits for each counter.

    Args:
        counter: four int64 tensors of one broadcastable shape, each word in [0, 2**32).
        key: two int64 tensors that broadcast against the counter, each word in [0, 2**32).

    Returns:
        Four int64 tensors with words in [0, 2**32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The low 64 bits of a product of two 32-bit words are exact in int64 although its sign may turn.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK) ^ c1 ^ k0,
            p1 & _MASK,
            ((p0 >> 32) & _MASK) ^ c3 ^ k1,
            p0 & _MASK,
        )
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return [c0, c1, c2, c3]


def gumbel_noise(seed_B: Tensor, choice_B: Tensor, position_B: Tensor, vocab_size: int) -> Tensor:
    """Standard Gumbel noise [B, V] float32, a function of (seed, choice, position, token id) alone.

    Args:
        seed_B: int64, the 64 bits of an unsigned seed.
        choice_B, position_B: int64 in [0, 2**32).
    """
    seed_B1 = seed_B[:, None]
    quad_1Q = torch.arange(-(-vocab_size // 4), device=seed_B.device)[None, :]
    words = philox(
        (quad_1Q, position_B[:, None], choice_B[:, None], torch.zeros_like(quad_1Q)),
        (seed_B1 & _MASK, (seed_B1 >> 32) & _MASK),
    )
    bits_BV = torch.stack(words, dim=-1).flatten(1)[:, :vocab_size]
    # float64, so that no word rounds to 0 or 1.
    uniform_BV = (bits_BV.double() + 0.5) * 2.0**-32
    return -(-uniform_BV.log()).log().float()


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


def sample(logits_BV: Tensor, temperature_B: Tensor, seed_B: Tensor, choice_B: Tensor, position_B: Tensor) -> Tensor:
    """Token ids [B] int64: argmax where the temperature is 0, a draw from softmax(logits) elsewhere (Gumbel-max).

    Args:
        logits_BV: float32, temperature and filters applied.
        temperature_B: float32; only whether it is 0 matters here.
        seed_B, choice_B, position_B: see ``gumbel_noise``.
    """
    noise_BV = gumbel_noise(seed_B, choice_B, position_B, logits_BV.shape[1])
    noise_BV = noise_BV.masked_fill((temperature_B == 0)[:, None], 0.0)
    return (logits_BV + noise_BV).argmax(dim=-1)
