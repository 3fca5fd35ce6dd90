"""The bridge from tower features to the decoder's width.

Suffixes: N images, S tokens an image, W tower features, D decoder width.
"""

from torch import Tensor, nn

from sightline_models.config import ProjectorConfig
from sightline_models.layers import ACTIVATION_FUNCTIONS, Linear


class Projector(nn.Module):
    """Linear, activation, linear."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.linear_1 = Linear(config.in_size, config.out_size, bias=config.bias)
        self.linear_2 = Linear(config.out_size, config.out_size, bias=config.bias)
        self.activation = ACTIVATION_FUNCTIONS[config.hidden_act]

    def forward(self, features_NSW: Tensor) -> Tensor:
        """Return hidden_NSD."""
        hidden_NSD: Tensor = self.linear_2(self.activation(self.linear_1(features_NSW)))
        return hidden_NSD
