"""Choosing a token in one launch, in Triton: one program a row, and no sort.

The bound of a filter is found by halving the whole numbers that stand in the order of float32, until one value is left:
each turn is a pass over the row, which lies in the nearest cache by then. A row without a filter makes no such pass.
Knows logits and numbers. Knows nothing of requests. Suffixes as in ``reference.py``.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sightline_kernels.launch import Launch, block_of
from sightline_kernels.sample.reference import GROUP, LARGEST_REST

BLOCK = 8192
"""Most logits that a program holds at a time."""
MOST_TOKENS = 2**24
"""Tokens are counted in float32, which holds every whole number up to here."""

_NONE = tl.constexpr(float("-inf"))
# Of minus infinity, and past all others.
_LEAST_KEY, _LARGEST_KEY = tl.constexpr(-0x7F800001), tl.constexpr(0x7FFFFFFF)
_LARGEST_REST = tl.constexpr(LARGEST_REST)
_LOG2_E = tl.constexpr(1.4426950408889634)


def refusal() -> str | None:
    """Nothing is refused: a row of any width is passed over in blocks."""
    return None


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
    """The twin of ``reference.sample``; each row finds out by itself whether it is filtered."""
    token_B = torch.empty(len(logits_BV), dtype=torch.int64, device=logits_BV.device)
    plan(logits_BV, temperature_B, top_k_B, top_p_B, min_p_B, seed_B, choice_B, position_B, token_B).run()
    return token_B


def plan(
    logits_BV: Tensor,
    temperature_B: Tensor,
    top_k_B: Tensor,
    top_p_B: Tensor,
    min_p_B: Tensor,
    seed_B: Tensor,
    choice_B: Tensor,
    position_B: Tensor,
    token_B: Tensor,
) -> Launch:
    """The launch that fills ``token_B``."""
    num_rows, vocab_size = logits_BV.shape
    assert 0 < vocab_size <= MOST_TOKENS, f"{vocab_size} tokens, 1 to {MOST_TOKENS} are sampled"
    assert logits_BV.dtype == torch.float32, f"logits are {logits_BV.dtype}, float32 is sampled"
    assert logits_BV.stride(1) == 1, f"a row's logits must lie side by side: {logits_BV.stride()}"
    numbers = {
        "temperature_ptr": temperature_B,
        "top_k_ptr": top_k_B,
        "top_p_ptr": top_p_B,
        "min_p_ptr": min_p_B,
        "seed_ptr": seed_B,
        "choice_ptr": choice_B,
        "position_ptr": position_B,
        "token_ptr": token_B,
    }
    for name, each in numbers.items():
        assert each.shape == (num_rows,), f"{name} is of shape {tuple(each.shape)}, {num_rows} rows"
        assert each.is_contiguous(), f"{name} has strides {each.stride()}"
    block = max(GROUP, min(BLOCK, block_of(vocab_size)))
    return Launch(
        _sample,
        (num_rows,),
        {"logits_ptr": logits_BV, **numbers, "stride": logits_BV.stride(0)},
        {"VOCAB": vocab_size, "GROUP": GROUP, "BLOCK": block},
        num_warps=min(16, max(1, block // 512)),
    )


@triton.jit
def _load(row_ptr: "Any", places: "Any", VOCAB: tl.constexpr) -> "Any":
    # Adding a zero makes minus zero, which it equals, one with zero.
    return tl.load(row_ptr + places, mask=places < VOCAB, other=_NONE) + 0.0


@triton.jit
def _key(logit: "Any") -> "Any":
    """The int32 that compares with others as this float32 does with theirs."""
    bits = logit.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _weight(logit: "Any", largest: "Any", scale: "Any") -> "Any":
    return tl.exp2((logit - largest) * scale)


@triton.jit
def _weigh(
    row_ptr: "Any", least: "Any", largest: "Any", scale: "Any", VOCAB: tl.constexpr, BLOCK: tl.constexpr
) -> "Any":
    """The sum of weights of the tokens whose key is at least ``least``."""
    sums = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, VOCAB, BLOCK):
        logit = _load(row_ptr, first + tl.arange(0, BLOCK), VOCAB)
        sums += tl.where(_key(logit) >= least, _weight(logit, largest, scale), 0.0)
    return tl.sum(sums)


@triton.jit
def _bound(
    row_ptr: "Any",
    low: "Any",
    target: "Any",
    largest: "Any",
    scale: "Any",
    VOCAB: tl.constexpr,
    BLOCK: tl.constexpr,
) -> "Any":
    """The key of the likeliest token that weighs ``target`` together with all that are likelier.

    ``low``, an int64, is a key at which the target is known to be reached. With a ``scale`` of 0 every token weighs 1.
    """
    high = _key(largest).to(tl.int64) + 1
    # Between them lie fewer than 2**32 keys, and each turn halves their number or better.
    while high - low > 1:
        middle = (low + high) >> 1
        key_middle = middle.to(tl.int32)
        sums = tl.zeros((BLOCK,), tl.float32)
        above = tl.full((BLOCK,), _LARGEST_KEY, tl.int32)
        below = tl.full((BLOCK,), _LEAST_KEY, tl.int32)
        for first in range(0, VOCAB, BLOCK):
            logit = _load(row_ptr, first + tl.arange(0, BLOCK), VOCAB)
            key = _key(logit)
            over = key >= key_middle
            sums += tl.where(over, _weight(logit, largest, scale), 0.0)
            above = tl.minimum(above, tl.where(over, key, _LARGEST_KEY))
            below = tl.maximum(below, tl.where(over, _LEAST_KEY, key))
        reached = tl.sum(sums) >= target
        # Both ends move on to keys that tokens have, so that of equals no more turns are made.
        low = tl.where(reached, tl.min(above).to(tl.int64), low)
        high = tl.where(reached, high, tl.max(below).to(tl.int64) + 1)
    return low


@triton.jit
def _gumbel(place: "Any", seed: "Any", choice: "Any", position: "Any") -> "Any":
    """Gumbel noise at these int32 places, as ``reference.gumbel_noise`` gives it."""
    quad = (place // 4).to(tl.uint32)
    zero = quad * 0
    words = tl.philox(seed, quad, zero + position.to(tl.uint32), zero + choice.to(tl.uint32), zero)
    word = place % 4
    bits = tl.where(word < 2, tl.where(word == 0, words[0], words[1]), tl.where(word == 2, words[2], words[3]))
    rest = tl.minimum((bits.to(tl.float32) + 0.5) * (0.5**32), _LARGEST_REST)
    # The logarithm of 1 - rest: near 1 it is a series, since the difference has lost what rest's last bits say.
    part = rest / (2.0 - rest)
    square = part * part
    series = 1 / 9 + square * (1 / 11 + square * (1 / 13))
    series = 1.0 + square * (1 / 3 + square * (1 / 5 + square * (1 / 7 + square * series)))
    return -tl.log(tl.where(rest < 0.5, 2.0 * part * series, -tl.log(1.0 - rest)))


@triton.jit
def _scaled(logit: "Any", least: "Any", likely: "Any", temperature: "Any") -> "Any":
    """Logits over the temperature, rounded as the reference's, and minus infinity where a filter drops the token."""
    scaled = tl.div_rn(logit, temperature)
    return tl.where((_key(logit) >= least) & (scaled >= likely), scaled, _NONE)


# Where a row's numbers lie says nothing about how they are loaded: aligned or not, nothing is compiled anew.
@triton.jit(
    do_not_specialize=[
        "temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr", "seed_ptr", "choice_ptr", "position_ptr", "token_ptr",
    ]
)  # fmt: skip
def _sample(
    logits_ptr: "Any",
    temperature_ptr: "Any",
    top_k_ptr: "Any",
    top_p_ptr: "Any",
    min_p_ptr: "Any",
    seed_ptr: "Any",
    choice_ptr: "Any",
    position_ptr: "Any",
    token_ptr: "Any",
    stride: "Any",
    VOCAB: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    temperature = tl.load(temperature_ptr + row)
    peaks = tl.full((BLOCK,), _NONE, tl.float32)
    for first in range(0, VOCAB, BLOCK):
        peaks = tl.maximum(peaks, _load(row_ptr, first + tl.arange(0, BLOCK), VOCAB))
    largest = tl.max(peaks)
    if temperature == 0.0:
        # Logits that are no numbers must give a token all the same: its embedding will be looked up.
        nearest = tl.full((BLOCK,), VOCAB - 1, tl.int32)
        for first in range(0, VOCAB, BLOCK):
            places = first + tl.arange(0, BLOCK)
            nearest = tl.minimum(nearest, tl.where(_load(row_ptr, places, VOCAB) == largest, places, VOCAB - 1))
        token = tl.min(nearest)
    else:
        top_k = tl.load(top_k_ptr + row)
        top_p = tl.load(top_p_ptr + row)
        least = tl.full((), _LEAST_KEY, tl.int64)
        if (top_k > 0) & (top_k < VOCAB):
            least = _bound(row_ptr, least, top_k.to(tl.float32), largest, 0.0, VOCAB, BLOCK)
        if top_p < 1.0:
            scale = _LOG2_E / temperature
            whole = _weigh(row_ptr, least, largest, scale, VOCAB, BLOCK)
            least = _bound(row_ptr, least, whole * top_p, largest, scale, VOCAB, BLOCK)
        likely = tl.div_rn(largest, temperature) + tl.log(tl.minimum(tl.load(min_p_ptr + row), 1.0))
        seed, choice, position = tl.load(seed_ptr + row), tl.load(choice_ptr + row), tl.load(position_ptr + row)

        GROUPS: tl.constexpr = BLOCK // GROUP
        best = tl.full((), _NONE, tl.float32)
        group = tl.full((), 0, tl.int32)
        tokens = tl.arange(0, GROUP)
        for first in range(0, VOCAB, BLOCK):
            groups = first // GROUP + tl.arange(0, GROUPS)
            logit = _load(row_ptr, groups[:, None] * GROUP + tokens[None, :], VOCAB)
            scaled = _scaled(logit, least, likely, temperature)
            peak = tl.max(scaled, axis=1)
            shift = tl.where(peak == _NONE, 0.0, peak)
            sums = tl.sum(tl.exp(scaled - shift[:, None]), axis=1)
            score = shift + tl.log(sums) + _gumbel(groups, seed, choice, position)
            here = tl.max(score)
            group = tl.where(here > best, first // GROUP + tl.argmax(score, axis=0), group)
            best = tl.maximum(best, here)
        places = group * GROUP + tokens
        scaled = _scaled(_load(row_ptr, places, VOCAB), least, likely, temperature)
        score = scaled + _gumbel((VOCAB + GROUP - 1) // GROUP + tokens, seed, choice, position)
        token = tl.minimum(group * GROUP + tl.argmax(score, axis=0), VOCAB - 1)
    tl.store(token_ptr + row, token.to(tl.int64))
