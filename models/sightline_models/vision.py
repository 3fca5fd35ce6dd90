"""The CLIP ViT tower, up to the deepest layer whose features are used.

Knows normalized pixels. Knows nothing of files, resizing or the decoder. Suffixes: N images, Y and X pixel rows and
columns, C colour channels, S tower tokens (the class token, then patches in reading order), W tower width,
H heads, D head dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sightline_kernels.dispatch import REFERENCES, Kernels
from sightline_models.config import VisionConfig
from sightline_models.layers import ACTIVATION_FUNCTIONS, Linear


class ClipVit(nn.Module):
    def __init__(self, config: VisionConfig, depths: tuple[int, ...], kernels: Kernels = REFERENCES) -> None:
        """``depths`` count layers run: the features after each are wanted. No layer past the deepest is made."""
        super().__init__()
        self.config = config
        self.depths = depths
        patch_numbers = 3 * config.patch_size**2
        self.patch_embedding = Linear(patch_numbers, config.hidden_size, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(config.hidden_size))
        self.position_embedding = nn.Parameter(torch.zeros(config.num_patches + 1, config.hidden_size))
        self.pre_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(VisionLayer(config, kernels) for _ in range(max(depths)))

    def forward(self, pixels_NYXC: Tensor) -> Tensor:
        """Return the wanted features side by side, [N, S, W * len(depths)], class token first."""
        patches_NSW: Tensor = self.patch_embedding(self._patches(pixels_NYXC))
        class_N1W = self.class_embedding.expand(patches_NSW.shape[0], 1, -1)
        hidden_NSW: Tensor = self.pre_norm(torch.cat((class_N1W, patches_NSW), dim=1) + self.position_embedding)
        features = {0: hidden_NSW}
        for depth, layer in enumerate(self.layers, start=1):
            hidden_NSW = layer(hidden_NSW)
            if depth in self.depths:
                features[depth] = hidden_NSW
        if len(self.depths) == 1:
            return features[self.depths[0]]
        return torch.cat([features[depth] for depth in self.depths], dim=-1)

    def _patches(self, pixels_NYXC: Tensor) -> Tensor:
        """Cut into squares: [N, patches, C * patch * patch], each channel by channel like the weights."""
        num_images = pixels_NYXC.shape[0]
        patch, side = self.config.patch_size, self.config.patches_per_side
        used = side * patch
        squares = pixels_NYXC[:, :used, :used].reshape(num_images, side, patch, side, patch, 3)
        return squares.permute(0, 1, 3, 5, 2, 4).reshape(num_images, side * side, -1)


class VisionLayer(nn.Module):
    """Self-attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: VisionConfig, kernels: Kernels) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.norm_1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size)
        self.out = Linear(config.hidden_size, config.hidden_size)
        self.norm_2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.fc_1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc_2 = Linear(config.intermediate_size, config.hidden_size)
        known = ACTIVATION_FUNCTIONS[config.hidden_act]
        self.activation = kernels.quick_gelu if config.hidden_act == "quick_gelu" else known

    def forward(self, hidden_NSW: Tensor) -> Tensor:
        hidden_NSW = hidden_NSW + self._attend(self.norm_1(hidden_NSW))
        feed_forward_NSW: Tensor = self.fc_2(self.activation(self.fc_1(self.norm_2(hidden_NSW))))
        return hidden_NSW + feed_forward_NSW

    def _attend(self, normed_NSW: Tensor) -> Tensor:
        num_images, num_tokens, _ = normed_NSW.shape
        qkv_NS3HD = self.qkv(normed_NSW).view(num_images, num_tokens, 3, self.num_heads, -1)
        q_NHSD, k_NHSD, v_NHSD = qkv_NS3HD.permute(2, 0, 3, 1, 4).unbind(0)
        out_NHSD = F.scaled_dot_product_attention(q_NHSD, k_NHSD, v_NHSD)
        projected_NSW: Tensor = self.out(out_NHSD.transpose(1, 2).flatten(2))
        return projected_NSW
