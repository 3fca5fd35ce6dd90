"""The whole model: pictures to hidden rows, token ids to hidden rows, hidden rows to logits.

Knows tensors. Which rows are whose, and when to run what, is the engine's business.
Suffixes: N images, Y and X pixel rows and columns, C colour channels, I tokens an image, T packed tokens, D decoder
width, S sampled rows, V vocabulary.
"""

import torch
from torch import Tensor, nn

from sightline_kernels.dispatch import REFERENCES, Kernels
from sightline_kernels.layout import PagedLayout
from sightline_models.config import Normalization, VlmConfig
from sightline_models.decoder import Decoder
from sightline_models.kv import KvPool
from sightline_models.layers import Linear, RmsNorm
from sightline_models.projector import Projector
from sightline_models.quantize import Int8Linear
from sightline_models.vision import ClipVit


class Vlm(nn.Module):
    """A LLaVA. Call everything under ``torch.inference_mode()``; nothing here waits for the device."""

    def __init__(self, config: VlmConfig, normalization: Normalization, kernels: Kernels = REFERENCES) -> None:
        super().__init__()
        self.config = config
        self.normalization = normalization
        self.vision = ClipVit(config.vision, config.feature_depths, kernels)
        self.projector = Projector(config.projector)
        self.decoder = Decoder(config.decoder, kernels)
        self.build_tables()

    def build_tables(self) -> None:
        """Make the constants that no checkpoint holds, where the weights are: once these have moved, call again."""
        device = self.vision.class_embedding.device
        for name, values in (("pixel_mean_C", self.normalization.mean), ("pixel_std_C", self.normalization.std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32, device=device), persistent=False)
        self.decoder.build_tables()

    def pack_weights(self) -> None:
        """Reorder linear weights for this device, one at a time; call when they are final and in place."""
        decoding = set(self.decoder.modules())
        for module in self.modules():
            if isinstance(module, Linear):
                module.pack(for_single_rows=module in decoding)
            elif isinstance(module, Int8Linear | RmsNorm):
                module.pack()

    @property
    def num_bytes(self) -> int:
        """What weights, tables and constants take."""
        return sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))

    def encode_images(self, pixels_NYXC: Tensor) -> Tensor:
        """Turn uint8 pixels of the tower's image size into decoder rows [N, num_image_tokens, D]."""
        normalized_NYXC = pixels_NYXC.float().mul_(self.normalization.rescale_factor)
        normalized_NYXC = normalized_NYXC.sub_(self.get_buffer("pixel_mean_C")).div_(self.get_buffer("pixel_std_C"))
        features_NSW = self.vision(normalized_NYXC.to(self.vision.class_embedding.dtype))
        if self.config.select_strategy == "default":
            features_NSW = features_NSW[:, 1:]
        hidden_NID: Tensor = self.projector(features_NSW)
        return hidden_NID

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """Return hidden_TD. Image placeholders get their token's row: overwrite them with ``encode_images``' rows."""
        return self.decoder.embed(token_ids_T)

    def forward(self, hidden_TD: Tensor, positions_T: Tensor, kv: KvPool, layout: PagedLayout) -> Tensor:
        """Run the decoder over one packed step; return normed hidden_TD. Keys and values are stored in ``kv``."""
        normed_TD: Tensor = self.decoder(hidden_TD, positions_T, kv, layout)
        return normed_TD

    def logits(self, hidden_SD: Tensor) -> Tensor:
        """Return float32 logits_SV."""
        return self.decoder.logits(hidden_SD)
