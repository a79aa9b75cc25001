"""Residual networks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from fedfuse.core.errors import ModelError
from fedfuse.core.registry import register_model
from fedfuse.models.family import Norm, Normalizer

_STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


@register_model("resnet")
@dataclass(frozen=True, kw_only=True)
class ResNet:
    """A residual network (He et al., CVPR 2016) of any width.

    Args:
        depth: 18, 34 (basic blocks) or 50 (bottlenecks).
        width: channels of the first stage; 64 in the paper.
        norm: ``batch``, ``group`` or ``none``.
        stem: ``cifar``: 3x3 without stride or pooling; ``imagenet``: 7x7 with stride 2 and pooling.
    """

    depth: Literal[18, 34, 50] = 18
    width: int = 64
    norm: Norm = "batch"
    stem: Literal["cifar", "imagenet"] = "cifar"

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
                f"a resnet takes images, not inputs of shape {input_shape}", where="model.family", fix="use family: mlp"
            )
        norm = Normalizer(self.norm)
        small = self.stem == "cifar"
        layers: list[nn.Module] = [
            nn.Conv2d(input_shape[0], self.width, 3 if small else 7, 1 if small else 2, 1 if small else 3, bias=False),
            norm(self.width),
            nn.ReLU(),
        ]
        if not small:
            layers.append(nn.MaxPool2d(3, 2, 1))
        channels = self.width
        for stage, num_blocks in enumerate(_STAGES[self.depth]):
            for i in range(num_blocks):
                wide, stride = self.width * 2**stage, 2 if stage > 0 and i == 0 else 1
                if self.depth == 50:
                    layers.append(Residual(bottleneck(channels, wide, stride, norm), channels, 4 * wide, stride, norm))
                    channels = 4 * wide
                else:
                    layers.append(Residual(basic(channels, wide, stride, norm), channels, wide, stride, norm))
                    channels = wide
        return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, num_classes))


class Residual(nn.Module):
    """A body with a shortcut around it.

    Args:
        body: the layers.
        in_channels: of the input.
        out_channels: of the body's output.
        stride: of the body.
        norm: makes the shortcut's normalisation.
    """

    def __init__(self, body: nn.Module, in_channels: int, out_channels: int, stride: int, norm: Normalizer) -> None:
        super().__init__()
        self.body = body
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), norm(out_channels)
            )
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Add body and shortcut.

        Args:
            x: shape ``(n, in_channels, h, w)``.

        Returns:
            Shape ``(n, out_channels, h / stride, w / stride)``.
        """
        summed: Tensor = self.activation(self.body(x) + self.shortcut(x))
        return summed


def basic(in_channels: int, width: int, stride: int, norm: Normalizer) -> nn.Module:
    """Two 3x3 convolutions.

    Args:
        in_channels: of the input.
        width: of the output.
        stride: of the first convolution.
        norm: makes the normalisation layers.
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 3, stride, 1, bias=False),
        norm(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, 1, 1, bias=False),
        norm(width),
    )


def bottleneck(in_channels: int, width: int, stride: int, norm: Normalizer) -> nn.Module:
    """1x1, 3x3 and 1x1 convolutions; the last is four times as wide.

    Args:
        in_channels: of the input.
        width: of the inner maps.
        stride: of the 3x3 convolution.
        norm: makes the normalisation layers.
    """
    return nn.Sequential(
        nn.Conv2d(in_channels, width, 1, bias=False),
        norm(width),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, stride, 1, bias=False),
        norm(width),
        nn.ReLU(),
        nn.Conv2d(width, 4 * width, 1, bias=False),
        norm(4 * width),
    )
