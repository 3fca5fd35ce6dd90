"""A Llama decoder over packed tokens and a paged cache.

Knows positions and layers. Knows nothing of pictures: an image's tokens arrive as hidden rows like any others.
Suffixes: T packed tokens, W model width, D head dim, S sampled rows, V vocabulary, M positions.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline_kernels.dispatch import REFERENCES, Kernels, Workload, can_build_launchers, capability_of
from sightline_kernels.layout import PagedLayout
from sightline_models.config import DecoderConfig, RopeConfig
from sightline_models.kv import KvPool
from sightline_models.layers import DecoderLayer, Linear, RmsNorm
from sightline_models.quantization_config import Quantization


class Decoder(nn.Module):
    cos_MD: Tensor
    sin_MD: Tensor

    def __init__(self, config: DecoderConfig, kernels: Kernels = REFERENCES) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        # Of no values, like all layers here. Drawing some for it on "meta" would import the whole of torch's compiler.
        empty_VW = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, _weight=empty_VW)
        self.layers = nn.ModuleList(DecoderLayer(config, kernels) for _ in range(config.num_layers))
        self.norm = RmsNorm(config, kernels)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        self.build_tables()

    @property
    def heads_apart(self) -> bool:
        """Whether its cache is to be kept with heads apart (``KvPool.allocate``), the order of a CPU's references."""
        return self.embed_tokens.weight.is_cpu and self.kernels == REFERENCES

    def build_tables(self) -> None:
        """Make the rotary tables where, and in the dtype that, the weights are."""
        weight = self.embed_tokens.weight
        cos_MD, sin_MD = rotary_tables(self.config)
        self.register_buffer("cos_MD", cos_MD.to(weight), persistent=False)
        self.register_buffer("sin_MD", sin_MD.to(weight), persistent=False)

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """Return hidden_TW."""
        return F.embedding(token_ids_T, self.embed_tokens.weight)

    def forward(self, hidden_TW: Tensor, positions_T: Tensor, kv: KvPool, layout: PagedLayout) -> Tensor:
        """Run all layers, storing keys and values at ``layout.slots_T``; return the normed hidden_TW."""
        cos_TD = self.cos_MD.index_select(0, positions_T)
        sin_TD = self.sin_MD.index_select(0, positions_T)
        x_TW, residual_TW = hidden_TW, None
        for layer, k_cache_NPGD, v_cache_NPGD in zip(
            self.layers, kv.k_LNPGD.unbind(0), kv.v_LNPGD.unbind(0), strict=True
        ):
            x_TW, residual_TW = layer(x_TW, residual_TW, cos_TD, sin_TD, k_cache_NPGD, v_cache_NPGD, layout)
        normed_TW: Tensor = self.norm(x_TW, residual_TW)[0]
        return normed_TW

    def logits(self, hidden_SW: Tensor) -> Tensor:
        """Return float32 logits_SV."""
        logits_SV: Tensor = self.lm_head(hidden_SW)
        return logits_SV.float()


def kernel_workload(
    config: DecoderConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    row_invariant: bool = False,
    quantization: Quantization = "none",
) -> Workload:
    """What a decoder of this shape will ask of its kernels."""
    return Workload(
        device=device,
        capability=capability_of(device),
        dtype=dtype,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        row_invariant=row_invariant,
        quantization=quantization,
        can_build=can_build_launchers(),
    )


def rotary_tables(config: DecoderConfig) -> tuple[Tensor, Tensor]:
    """Float32 ``(cos_MD, sin_MD)`` for every position, in the halves and signs that ``apply_rotary`` takes."""
    # On the CPU whatever the default device: positions times frequencies must round the same everywhere.
    positions_M = torch.arange(config.max_position_embeddings, dtype=torch.float32, device="cpu")
    angles_MR = torch.outer(positions_M, _inverse_frequencies(config.rope, config.head_dim))
    cos_MR, sin_MR = angles_MR.cos(), angles_MR.sin()
    return torch.cat((cos_MR, cos_MR), dim=1), torch.cat((-sin_MR, sin_MR), dim=1)


def _inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    exponents_R = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
    frequencies_R = 1.0 / (rope.theta**exponents_R)
    if rope.type == "linear":
        return frequencies_R / rope.factor
    if rope.type == "llama3":
        # Long wavelengths are stretched by the factor, short ones kept, those between blended.
        wavelengths_R = 2 * math.pi / frequencies_R
        turns_R = rope.original_max_position_embeddings / wavelengths_R
        kept_R = (turns_R - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        kept_R = kept_R.clamp(0.0, 1.0)
        return (1 - kept_R) * frequencies_R / rope.factor + kept_R * frequencies_R
    return frequencies_R
