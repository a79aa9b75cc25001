"""Images of any size to one size."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from fedfuse.core.errors import ConfigError
from fedfuse.core.examples import Examples


def resized(examples: Examples, side_px: int) -> Examples:
    """Bring images to a square of one size, by bilinear interpolation; shrinking averages over all pixels.

    Args:
        examples: images, shape ``(n, channels, height, width)``.
        side_px: height and width of the result in pixels.

    Returns:
        Shape ``(n, channels, side_px, side_px)``; the examples themselves where they have that size.

    Raises:
        ConfigError: the inputs are no images, or the size is below 1.
    """
    if side_px < 1:
        raise ConfigError(
            f"resize must be at least 1, not {side_px}", where="data.resize", fix="give the side in pixels"
        )
    if examples.x.dim() != 4:
        raise ConfigError(
            f"resize is for images, not for inputs of shape {tuple(examples.x.shape[1:])}",
            where="data.resize",
            fix="leave resize out",
        )
    if tuple(examples.x.shape[2:]) == (side_px, side_px):
        return examples
    x: Tensor = F.interpolate(examples.x, size=(side_px, side_px), mode="bilinear", align_corners=False, antialias=True)
    return Examples(x, examples.y)
