"""A convolutional network."""

import math
from dataclasses import dataclass

from torch import nn

from experiments.training.models import Network


@dataclass(frozen=True)
class ConvNet(Network):
    """Two convolutions, for square images of one channel.

    Attributes:
        channels: the channels of the first convolution; the second has twice as many.
    """

    channels: int = 8

    def body(self, num_inputs: int) -> tuple[nn.Sequential, int]:
        """The layers below the head, and the number of their outputs."""
        side = math.isqrt(num_inputs)
        layers = nn.Sequential(
            nn.Unflatten(1, (1, side, side)),
            nn.Conv2d(1, self.channels, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(self.channels, 2 * self.channels, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        return layers, 2 * self.channels * (side // 2) ** 2
