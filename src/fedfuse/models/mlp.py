"""Multi-layer perceptrons."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from fedfuse.core.registry import register_model


@register_model("mlp")
@dataclass(frozen=True, kw_only=True)
class MLP:
    """A multi-layer perceptron on flattened inputs.

    Args:
        width: units of each hidden layer.
        depth: hidden layers.
        dropout: probability behind each hidden layer.
    """

    width: int = 128
    depth: int = 3
    dropout: float = 0.0

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Build the network.

        Args:
            input_shape: shape of one input.
            num_classes: number of outputs.
        """
        layers: list[nn.Module] = [nn.Flatten()]
        size = math.prod(input_shape)
        for _ in range(self.depth):
            layers += [nn.Linear(size, self.width), nn.ReLU()]
            if self.dropout:
                layers.append(nn.Dropout(self.dropout))
            size = self.width
        return nn.Sequential(*layers, nn.Linear(size, num_classes))
