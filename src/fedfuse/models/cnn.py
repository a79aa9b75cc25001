"""Small convolutional networks."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from fedfuse.core.errors import ModelError
from fedfuse.core.registry import register_model
from fedfuse.models.family import Norm, Normalizer


@register_model("cnn")
@dataclass(frozen=True, kw_only=True)
class CNN:
    """A plain convolutional network: 3x3 convolutions in stages that halve the image and double the width.

    Args:
        width: channels of the first stage.
        depth: convolutions in all; the width doubles after each pair, up to four times the first.
        norm: ``batch``, ``group`` or ``none``.
    """

    width: int = 32
    depth: int = 4
    norm: Norm = "batch"

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Build the network.

        Args:
            input_shape: ``(channels, height, width)``.
            num_classes: number of outputs.

        Raises:
            ModelError: the inputs are no images.
        """
        if len(input_shape) != 3:
            raise ModelError(
                f"a cnn takes images, not inputs of shape {input_shape}", where="model.family", fix="use family: mlp"
            )
        norm, channels, side = Normalizer(self.norm), input_shape[0], min(input_shape[1:])
        layers: list[nn.Module] = []
        for i in range(self.depth):
            wide = self.width * min(4, 2 ** (i // 2))
            layers += [nn.Conv2d(channels, wide, 3, padding=1, bias=self.norm == "none"), norm(wide), nn.ReLU()]
            # Small images keep at least 4 x 4 positions.
            if (i % 2 == 1 and side >= 8) or (i % 2 == 0 and side > 16):
                layers.append(nn.MaxPool2d(2))
                side //= 2
            channels = wide
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))
