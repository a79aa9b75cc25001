"""Small vision transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.errors import ConfigError, ModelError
from fedfuse.core.registry import register_model

Pool = Literal["token", "mean"]


@register_model("vit")
@dataclass(frozen=True, kw_only=True)
class ViT:
    """A vision transformer (Dosovitskiy et al., ICLR 2021) with pre-normalisation, for small images.

    Args:
        width: size of a token; a multiple of ``heads``.
        depth: transformer blocks, at least 1.
        heads: attention heads, at least 1.
        patch_size: side of a patch in pixels; divides both sides of the image.
        mlp_ratio: hidden units of a block's perceptron per unit of the width, at least 1.
        pool: ``token``: the head sees an extra class token; ``mean``: the average of all tokens.
        dropout: probability behind attention and perceptron, in [0, 1].
    """

    width: int = 64
    depth: int = 4
    heads: int = 4
    patch_size: int = 4
    mlp_ratio: int = 2
    pool: Pool = "mean"
    dropout: float = 0.0

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Build the network.

        Args:
            input_shape: ``(channels, height, width)``.
            num_classes: number of outputs.

        Raises:
            ConfigError: width and heads, or image and patches, do not fit.
            ModelError: the inputs are no images.
        """
        if len(input_shape) != 3:
            raise ModelError(
                f"a vit takes images, not inputs of shape {input_shape}", where="model.family", fix="use family: mlp"
            )
        if self.width % self.heads:
            raise ConfigError(
                f"{self.heads} heads cannot share a width of {self.width}",
                where="model.heads",
                fix="give a width that is a multiple of heads",
            )
        channels, height, width = input_shape
        if height % self.patch_size or width % self.patch_size:
            raise ConfigError(
                f"an image of {height} x {width} cannot be cut into patches of {self.patch_size} x {self.patch_size}",
                where="model.patch_size",
                fix="give a patch_size that divides both sides of the image",
            )
        num_patches = (height // self.patch_size) * (width // self.patch_size)
        blocks = [TransformerBlock(self.width, self.heads, self.mlp_ratio, self.dropout) for _ in range(self.depth)]
        return nn.Sequential(
            Patches(channels, self.patch_size, num_patches, self.width, self.pool),
            *blocks,
            nn.LayerNorm(self.width),
            PoolTokens(self.pool),
            nn.Linear(self.width, num_classes),
        )


class Patches(nn.Module):
    """Turns an image into tokens: one per patch, with its position, and the class token in front where there is one.

    Args:
        channels: of the image.
        patch_size: side of a patch in pixels.
        num_patches: patches in an image.
        width: size of a token.
        pool: ``token`` adds a class token.
    """

    def __init__(self, channels: int, patch_size: int, num_patches: int, width: int, pool: Pool) -> None:
        super().__init__()
        self.project = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.positions = nn.Parameter(torch.randn(1, num_patches, width) * 0.02)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.02) if pool == "token" else None

    def forward(self, x: Tensor) -> Tensor:
        """Cut into patches and project.

        Args:
            x: shape ``(n, channels, h, w)``.

        Returns:
            Shape ``(n, num_tokens, width)``.
        """
        tokens: Tensor = self.project(x).flatten(2).transpose(1, 2) + self.positions
        if self.token is None:
            return tokens
        return torch.cat([self.token.expand(x.shape[0], -1, -1), tokens], 1)


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each behind a layer normalisation and with a shortcut.

    Args:
        width: size of a token.
        heads: attention heads.
        mlp_ratio: hidden units per unit of the width.
        dropout: probability behind each of the two.
    """

    def __init__(self, width: int, heads: int, mlp_ratio: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, mlp_ratio * width), nn.GELU(), nn.Linear(mlp_ratio * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Run the block.

        Args:
            x: shape ``(n, num_tokens, width)``.

        Returns:
            The same shape.
        """
        x = x + self.dropout(self.attention(self.norm1(x)))
        out: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return out


class Attention(nn.Module):
    """Self-attention of several heads.

    Args:
        width: size of a token.
        heads: divides the width.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.inner, self.outer = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Attend.

        Args:
            x: shape ``(n, num_tokens, width)``.

        Returns:
            The same shape.
        """
        # (n, t, 3 d) -> (n, t, 3, h, d/h) -> (3, n, h, t, d/h)
        parts = self.inner(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        out: Tensor = self.outer(mixed.transpose(1, 2).flatten(2))
        return out


class PoolTokens(nn.Module):
    """One vector from all tokens.

    Args:
        pool: ``token``: the first; ``mean``: the average.
    """

    def __init__(self, pool: Pool) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, x: Tensor) -> Tensor:
        """Pool.

        Args:
            x: shape ``(n, num_tokens, width)``.

        Returns:
            Shape ``(n, width)``.
        """
        return x[:, 0] if self.pool == "token" else x.mean(1)
