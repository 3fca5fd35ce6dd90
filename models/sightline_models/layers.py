"""The parts of a decoder layer, over packed tokens, and the activations by their checkpoint names.

Knows weights and shapes. What happens inside attention, and where keys live, is the kernels' business.
Suffixes: T packed tokens, W model width, H query heads, G key/value heads, D head dim, N blocks, P slots a block,
F feed-forward width.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline_kernels.dispatch import Kernels
from sightline_kernels.layout import PagedLayout
from sightline_kernels.linear.reference import can_pack, linear, pack
from sightline_kernels.quick_gelu.reference import quick_gelu
from sightline_models.config import DecoderConfig


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


ACTIVATION_FUNCTIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": _gelu_tanh,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "silu": F.silu,
}
"""One for every name in ``config.ACTIVATIONS``."""


# oneDNN takes about 8 us to set out, which on one row of a weight this small is more than it saves.
_SMALL_BYTES = 2**20


class Linear(nn.Linear):
    """A linear layer whose weight may be packed once it is final."""

    small: Tensor | None = None
    """The weight as it was before packing, kept for single rows if it is small."""

    def forward(self, x: Tensor) -> Tensor:
        if self.small is not None and x.numel() == self.in_features:
            return linear(x, self.small, self.bias)
        return linear(x, self.weight, self.bias)

    def pack(self) -> None:
        """Replace the weight by one in the order this device multiplies fastest, where there is such an order."""
        if can_pack(self.weight):
            self.small = self.weight.detach() if self.weight.nbytes <= _SMALL_BYTES else None
            self.weight = nn.Parameter(pack(self.weight), requires_grad=False)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions; query, key and value weights are one matrix, in that order."""

    def __init__(self, config: DecoderConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.num_heads = config.num_heads
        self.num_kv_heads = config.num_kv_heads
        self.head_dim = config.head_dim
        self.scale = config.head_dim**-0.5
        fused = (config.num_heads + 2 * config.num_kv_heads) * config.head_dim
        self.qkv = Linear(config.hidden_size, fused, bias=config.attention_bias)
        self.o = Linear(config.num_heads * config.head_dim, config.hidden_size, bias=config.attention_bias)

    def forward(
        self,
        x_TW: Tensor,
        cos_TD: Tensor,
        sin_TD: Tensor,
        k_cache_NPGD: Tensor,
        v_cache_NPGD: Tensor,
        layout: PagedLayout,
    ) -> Tensor:
        heads_TXD = self.qkv(x_TW).view(x_TW.shape[0], -1, self.head_dim)
        q_THD, k_TGD, v_TGD = heads_TXD.split((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        q_THD = self.kernels.rotary_store_kv(
            q_THD, k_TGD, v_TGD, cos_TD, sin_TD, k_cache_NPGD, v_cache_NPGD, layout.slots_T
        )
        out_THD = self.kernels.paged_attention(q_THD, k_cache_NPGD, v_cache_NPGD, layout, self.scale)
        projected: Tensor = self.o(out_THD.flatten(1))
        return projected


class FeedForward(nn.Module):
    """SwiGLU; gate and up weights stand in one matrix, in that order."""

    def __init__(self, config: DecoderConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_up = Linear(config.hidden_size, 2 * config.intermediate_size, bias=config.mlp_bias)
        self.down = Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)

    def forward(self, x_TW: Tensor) -> Tensor:
        projected: Tensor = self.down(self.kernels.silu_mul(self.gate_up(x_TW)))
        return projected


class RmsNormWeight(nn.Module):
    """The learned scale of one RMS norm; the arithmetic is the kernels'."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, kernels: Kernels) -> None:
        super().__init__()
        self.kernels = kernels
        self.eps = config.rms_norm_eps
        self.input_norm = RmsNormWeight(config.hidden_size)
        self.attention = Attention(config, kernels)
        self.post_norm = RmsNormWeight(config.hidden_size)
        self.feed_forward = FeedForward(config, kernels)

    def forward(
        self,
        x_TW: Tensor,
        residual_TW: Tensor | None,
        cos_TD: Tensor,
        sin_TD: Tensor,
        k_cache_NPGD: Tensor,
        v_cache_NPGD: Tensor,
        layout: PagedLayout,
    ) -> tuple[Tensor, Tensor]:
        """Return this layer's contribution, not yet added, and the residual stream it is to be added to."""
        normed_TW, residual_TW = self.kernels.add_rms_norm(x_TW, residual_TW, self.input_norm.weight, self.eps)
        x_TW = self.attention(normed_TW, cos_TD, sin_TD, k_cache_NPGD, v_cache_NPGD, layout)
        normed_TW, residual_TW = self.kernels.add_rms_norm(x_TW, residual_TW, self.post_norm.weight, self.eps)
        return self.feed_forward(normed_TW), residual_TW
