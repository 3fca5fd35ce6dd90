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
from sightline_kernels.linear.reference import can_pack, linear, multiply_row, pack
from sightline_kernels.quick_gelu.reference import quick_gelu
from sightline_kernels.rms_norm import on_cpu as rms_norm_on_cpu
from sightline_kernels.rms_norm.reference import add_rms_norm
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


# oneDNN takes about 8 us to set out, and on one row of a weight this small more than it saves.
_SMALL = 3 * 2**17


class Linear(nn.Linear):
    """A linear layer whose weight may be packed once it is final."""

    alone_IO: Tensor | None = None
    """A small weight in float32, turned for products with a single row."""

    def forward(self, x: Tensor) -> Tensor:
        if self.alone_IO is not None and x.dim() == 2 and len(x) == 1:
            return multiply_row(x, self.alone_IO, self.bias)
        return linear(x, self.weight, self.bias)

    def pack(self, *, for_single_rows: bool) -> None:
        """Replace the weight by one in the order this device multiplies fastest, where there is such an order.

        ``for_single_rows`` keeps a second copy for inputs of one row, if the weight is small.
        """
        if can_pack(self.weight):
            if for_single_rows and self.weight.numel() <= _SMALL:
                self.alone_IO = self.weight.detach().t().float().contiguous()
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


class RmsNorm(nn.Module):
    """Adds to the residual stream and norms the sum, with a learned scale."""

    def __init__(self, config: DecoderConfig, kernels: Kernels) -> None:
        super().__init__()
        self.eps = config.rms_norm_eps
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.packed: Tensor | None = None
        self.add_rms_norm = kernels.add_rms_norm

    def forward(self, x_TW: Tensor, residual_TW: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return ``(normed_TW, residual_TW)``."""
        if self.packed is not None:
            return rms_norm_on_cpu.add_rms_norm(x_TW, residual_TW, self.packed, self.eps)
        return self.add_rms_norm(x_TW, residual_TW, self.weight, self.eps)

    def pack(self) -> None:
        """Take the way that is shorter on a CPU, where there is one."""
        if self.add_rms_norm is add_rms_norm and rms_norm_on_cpu.can_pack(self.weight):
            self.packed = rms_norm_on_cpu.pack(self.weight.detach())


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: DecoderConfig, kernels: Kernels) -> None:
        super().__init__()
        self.input_norm = RmsNorm(config, kernels)
        self.attention = Attention(config, kernels)
        self.post_norm = RmsNorm(config, kernels)
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
        normed_TW, residual_TW = self.input_norm(x_TW, residual_TW)
        x_TW = self.attention(normed_TW, cos_TD, sin_TD, k_cache_NPGD, v_cache_NPGD, layout)
        normed_TW, residual_TW = self.post_norm(x_TW, residual_TW)
        return self.feed_forward(normed_TW), residual_TW
