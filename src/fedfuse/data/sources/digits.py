"""The digits that scikit-learn carries: 1,797 grey images of 8 x 8 pixels, no download."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from fedfuse.core.examples import Examples
from fedfuse.core.registry import register_source
from fedfuse.data.checks import check_limit, optional_module
from fedfuse.data.dataset import Dataset

_TEST_FRACTION = 0.2


@register_source("digits")
@dataclass(frozen=True, kw_only=True)
class Digits:
    """Handwritten digits of 8 x 8 pixels that come with scikit-learn.

    Grey levels 0 .. 16 are divided by 16. A fifth is the test part; the split is stratified and always the same.
    """

    def load(self, limit: int | None = None, test_limit: int | None = None) -> Dataset:
        """Read the data.

        Args:
            limit: first training rows only.
            test_limit: first test rows only.

        Returns:
            1,438 training and 359 test images of shape ``(1, 8, 8)``.

        Raises:
            ConfigError: a limit is below 1.
        """
        check_limit("limit", limit)
        check_limit("test_limit", test_limit)
        bunch = optional_module("sklearn.datasets", package="scikit-learn", extra="data").load_digits()
        x = torch.from_numpy(bunch.images.astype(np.float32))[:, None] / 16
        y = torch.from_numpy(bunch.target.astype(np.int64))
        whole = Dataset(Examples(x, y), None, tuple("0123456789"), is_image=True, name="digits")
        return whole.with_test_part(_TEST_FRACTION).limited(limit, test_limit)
