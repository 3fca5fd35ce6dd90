"""The demo model as it is trained: a LLaVA over a flat dictionary of weights that bear their checkpoint names.

Knows tensors and the model's shape. Knows no scenes, no files and no optimizer.

It computes what the checkpoint computes, arranged for training. The decoder sees each picture once and many short
conversations about it side by side: all of them attend to the picture's tokens, and each to itself, which gives every
conversation the logits it would have alone. Tokens come as a prefix [B, P] that all share and groups of equally long
segments [B, N, S]; a row's hidden states are laid out as the prefix and then the groups' segments.

Sources: CLIP's vision tower (Radford et al. 2021), LLaVA-1.5 (Liu et al. 2023), Llama (Touvron et al. 2023).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]
"""By checkpoint names. Masters are float32; the functions here take a copy in the dtype to compute in."""

Layer = Callable[..., Tensor]
"""`tower_layer` or `decoder_layer`, or what a compiler made of it."""

TOWER = "model.vision_tower.vision_model"
PROJECTOR = "model.multi_modal_projector"
DECODER = "model.language_model"


@dataclass(frozen=True)
class Shape:
    """The numbers of the demo model."""

    vocab_size: int
    width: int = 192
    heads: int = 4
    image_size: int = 96
    patch_size: int = 8
    tower_layers: int = 5
    tower_mlp: int = 768
    decoder_layers: int = 4
    decoder_mlp: int = 512
    rope_theta: float = 10000.0
    positions: int = 2048
    eps: float = 1e-5

    @property
    def patches(self) -> int:
        return (self.image_size // self.patch_size) ** 2

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


def initial_weights(shape: Shape, generator: torch.Generator) -> Weights:
    """Random weights, float32.

    In the decoder each key projection starts as the query projection, and each output projection as the transposed
    value projection, so that attention begins by gathering from what is alike.
    """
    weights: Weights = {}

    def normal(name: str, *size: int, std: float) -> None:
        weights[name] = torch.randn(size, generator=generator) * std

    def linear(name: str, out: int, inn: int, scale: float = 1.0, bias: bool = True) -> None:
        normal(f"{name}.weight", out, inn, std=scale / math.sqrt(inn))
        if bias:
            weights[f"{name}.bias"] = torch.zeros(out)

    def norm(name: str, bias: bool = True) -> None:
        weights[f"{name}.weight"] = torch.ones(shape.width)
        if bias:
            weights[f"{name}.bias"] = torch.zeros(shape.width)

    width = shape.width
    normal(f"{TOWER}.embeddings.class_embedding", width, std=0.5)
    inputs = 3 * shape.patch_size**2
    normal(f"{TOWER}.embeddings.patch_embedding.weight", width, 3, shape.patch_size, shape.patch_size, std=inputs**-0.5)
    weights[f"{TOWER}.embeddings.position_embedding.weight"] = _sine_positions(shape, generator)
    norm(f"{TOWER}.pre_layrnorm")
    depth = 1 / math.sqrt(2 * shape.tower_layers)
    for index in range(shape.tower_layers):
        layer = f"{TOWER}.encoder.layers.{index}"
        for name in ("q_proj", "k_proj", "v_proj"):
            linear(f"{layer}.self_attn.{name}", width, width)
        linear(f"{layer}.self_attn.out_proj", width, width, depth)
        norm(f"{layer}.layer_norm1")
        norm(f"{layer}.layer_norm2")
        linear(f"{layer}.mlp.fc1", shape.tower_mlp, width)
        linear(f"{layer}.mlp.fc2", width, shape.tower_mlp, depth)
    norm(f"{TOWER}.post_layernorm")
    linear(f"{PROJECTOR}.linear_1", width, width)
    linear(f"{PROJECTOR}.linear_2", width, width)

    normal(f"{DECODER}.embed_tokens.weight", shape.vocab_size, width, std=0.5)
    depth = 1 / math.sqrt(2 * shape.decoder_layers)
    for index in range(shape.decoder_layers):
        layer = f"{DECODER}.layers.{index}"
        linear(f"{layer}.self_attn.q_proj", width, width, bias=False)
        weights[f"{layer}.self_attn.k_proj.weight"] = weights[f"{layer}.self_attn.q_proj.weight"].clone()
        linear(f"{layer}.self_attn.v_proj", width, width, bias=False)
        weights[f"{layer}.self_attn.o_proj.weight"] = depth * weights[f"{layer}.self_attn.v_proj.weight"].T.clone()
        norm(f"{layer}.input_layernorm", bias=False)
        norm(f"{layer}.post_attention_layernorm", bias=False)
        linear(f"{layer}.mlp.gate_proj", shape.decoder_mlp, width, bias=False)
        linear(f"{layer}.mlp.up_proj", shape.decoder_mlp, width, bias=False)
        linear(f"{layer}.mlp.down_proj", width, shape.decoder_mlp, depth, bias=False)
    norm(f"{DECODER}.norm", bias=False)
    weights["lm_head.weight"] = weights[f"{DECODER}.embed_tokens.weight"].clone() / math.sqrt(width)
    return weights


def _sine_positions(shape: Shape, generator: torch.Generator) -> Tensor:
    """[1 + patches, width]: sines and cosines of row and column, in a random rotation; the class token's at random."""
    side = shape.image_size // shape.patch_size
    quarter = shape.width // 4
    steps = torch.arange(side)[:, None] * torch.exp(-torch.arange(quarter) / quarter * math.log(50.0))[None]
    waves = torch.cat([steps.sin(), steps.cos()], dim=1)
    grid = torch.cat([waves.repeat_interleave(side, 0), waves.repeat(side, 1)], dim=1)
    rotation = torch.linalg.qr(torch.randn(shape.width, shape.width, generator=generator)).Q
    own = torch.randn(1, shape.width, generator=generator) * 0.5
    return torch.cat([own, grid @ rotation])


# ---- tower --------------------------------------------------------------------------------------------------------


def tower(weights: Weights, shape: Shape, pixels: Tensor, layer: Layer | None = None) -> Tensor:
    """The last layer's features [B, patches, width], without the class token, of ``pixels`` [B, 3, side, side]."""
    patches = _patches(pixels, shape.patch_size)
    kernel = weights[f"{TOWER}.embeddings.patch_embedding.weight"].flatten(1)
    own = weights[f"{TOWER}.embeddings.class_embedding"].expand(len(pixels), 1, -1)
    x = torch.cat([own, F.linear(patches, kernel)], dim=1)
    x = x + weights[f"{TOWER}.embeddings.position_embedding.weight"]
    x = _layer_norm(weights, f"{TOWER}.pre_layrnorm", x, shape.eps)
    for index in range(shape.tower_layers):
        here = part(weights, f"{TOWER}.encoder.layers.{index}")
        x = (layer or tower_layer)(here, x, shape.heads, shape.eps)
    return x[:, 1:]


def project(weights: Weights, features: Tensor) -> Tensor:
    """Features as decoder inputs, [..., width]."""
    hidden = F.gelu(_linear(weights, f"{PROJECTOR}.linear_1", features))
    return _linear(weights, f"{PROJECTOR}.linear_2", hidden)


def part(weights: Weights, name: str) -> Weights:
    """The weights under ``name``, by what is left of their names."""
    return {key[len(name) + 1 :]: value for key, value in weights.items() if key.startswith(f"{name}.")}


def _patches(pixels: Tensor, size: int) -> Tensor:
    """[B, 3, H, W] as [B, patches, 3 * size * size], in a convolution kernel's order."""
    batch, channels, height, width = pixels.shape
    cut = pixels.view(batch, channels, height // size, size, width // size, size)
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(batch, -1, channels * size * size)


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])


def _layer_norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"], eps)


def tower_layer(weights: Weights, x: Tensor, heads: int, eps: float) -> Tensor:
    batch, length, width = x.shape
    h = _layer_norm(weights, "layer_norm1", x, eps)
    packed = torch.cat([weights[f"self_attn.{name}.weight"] for name in ("q_proj", "k_proj", "v_proj")])
    bias = torch.cat([weights[f"self_attn.{name}.bias"] for name in ("q_proj", "k_proj", "v_proj")])
    q, k, v = F.linear(h, packed, bias).view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    h = (scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, length, width)
    x = x + _linear(weights, "self_attn.out_proj", h)
    h = _linear(weights, "mlp.fc1", _layer_norm(weights, "layer_norm2", x, eps))
    return x + _linear(weights, "mlp.fc2", h * torch.sigmoid(1.702 * h))


# ---- decoder ------------------------------------------------------------------------------------------------------


def decode(
    weights: Weights, shape: Shape, prefix: Tensor, groups: Sequence[Tensor], layer: Layer | None = None
) -> list[Tensor]:
    """Hidden states after the last norm, for each group [B, N, S, width], from embeddings.

    ``prefix`` [B, P, width] is seen by every segment; a segment's positions go on from P.
    """
    batch, start, width = prefix.shape
    sizes = [(group.shape[1], group.shape[2]) for group in groups]
    x = torch.cat([prefix, *(group.flatten(1, 2) for group in groups)], dim=1)
    turn = rotation(shape, start, sizes, x.device, x.dtype)
    masks = [_causal(start, x.device, x.dtype), *(_causal(size, x.device, x.dtype) for _, size in sizes)]
    for index in range(shape.decoder_layers):
        here = part(weights, f"{DECODER}.layers.{index}")
        x = (layer or decoder_layer)(here, x, start, sizes, turn, masks, shape.heads, shape.eps)
    x = F.rms_norm(x[:, start:], (width,), weights[f"{DECODER}.norm.weight"], shape.eps)
    parts = torch.split(x, [count * size for count, size in sizes], dim=1)
    return [part.view(batch, count, size, width) for part, (count, size) in zip(parts, sizes, strict=True)]


def embed(weights: Weights, tokens: Tensor) -> Tensor:
    return F.embedding(tokens, weights[f"{DECODER}.embed_tokens.weight"])


def rotation(
    shape: Shape, start: int, sizes: Sequence[tuple[int, int]], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [tokens, head_dim] of every token's rotary angles."""
    runs = [torch.arange(start)] + [torch.arange(start, start + size).repeat(count) for count, size in sizes]
    inverse = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2) / shape.head_dim)
    angles = (torch.cat(runs)[:, None] * inverse[None]).repeat(1, 2)
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def _causal(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.full((size, size), -1e4, device=device, dtype=dtype).triu(1)


def _rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    one, two = x.chunk(2, dim=-1)
    return x * turn[0] + torch.cat([-two, one], dim=-1) * turn[1]


def decoder_layer(
    weights: Weights,
    x: Tensor,
    start: int,
    sizes: Sequence[tuple[int, int]],
    turn: tuple[Tensor, Tensor],
    masks: Sequence[Tensor],
    heads: int,
    eps: float,
) -> Tensor:
    batch, length, width = x.shape
    h = F.rms_norm(x, (width,), weights["input_layernorm.weight"], eps)
    packed = torch.cat([weights[f"self_attn.{name}.weight"] for name in ("q_proj", "k_proj", "v_proj")])
    q, k, v = F.linear(h, packed).view(batch, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
    q, k = _rotate(q, turn) * q.shape[-1] ** -0.5, _rotate(k, turn)
    first_k, first_v = k[:, :, :start], v[:, :, :start]
    scores = q[:, :, :start] @ first_k.transpose(-1, -2) + masks[0]
    outs = [scores.softmax(-1) @ first_v]
    at = start
    for (count, size), mask in zip(sizes, masks[1:], strict=True):
        end = at + count * size
        own_q, own_k, own_v = (whole[:, :, at:end].unflatten(2, (count, size)) for whole in (q, k, v))
        far = (q[:, :, at:end] @ first_k.transpose(-1, -2)).unflatten(2, (count, size))
        near = own_q @ own_k.transpose(-1, -2) + mask
        shares = torch.cat([far, near], dim=-1).softmax(-1)
        far_out = shares[..., :start].flatten(2, 3) @ first_v
        outs.append(far_out + (shares[..., start:] @ own_v).flatten(2, 3))
        at = end
    h = torch.cat(outs, dim=2).transpose(1, 2).reshape(batch, length, width)
    x = x + F.linear(h, weights["self_attn.o_proj.weight"])
    h = F.rms_norm(x, (width,), weights["post_attention_layernorm.weight"], eps)
    gate, up = F.linear(h, weights["mlp.gate_proj.weight"]), F.linear(h, weights["mlp.up_proj.weight"])
    return x + F.linear(F.silu(gate) * up, weights["mlp.down_proj.weight"])
