"""One stratified split, used for test parts and for validation parts."""

from __future__ import annotations

import numpy as np


def stratified_split(labels: np.ndarray, fraction: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Hold out a fraction of the examples so that every class keeps its share as nearly as whole numbers allow.

    Args:
        labels: class of each example, shape ``(n,)``.
        fraction: share to hold out, in [0, 1); ``n * fraction`` is rounded half up, and at least one example is kept.
        rng: which examples are held out.

    Returns:
        Positions kept and positions held out, both sorted, together ``0 .. n - 1``.

    Example:
        >>> kept, held = stratified_split(np.array([0, 0, 0, 0, 1, 1, 1, 1]), 0.25, np.random.default_rng(0))
        >>> len(kept), len(held)
        (6, 2)
    """
    n = len(labels)
    num_held = max(0, min(int(n * fraction + 0.5), n - 1))
    if num_held == 0:
        return np.arange(n, dtype=np.int64), np.empty(0, dtype=np.int64)
    _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    counts = share_out(num_held, sizes)
    held = [rng.permutation(np.flatnonzero(classes == c))[:count] for c, count in enumerate(counts)]
    held_positions = np.sort(np.concatenate(held)).astype(np.int64)
    return np.setdiff1d(np.arange(n, dtype=np.int64), held_positions), held_positions


def share_out(total: int, weights: np.ndarray) -> np.ndarray:
    """Share a whole number in proportion to weights: floors first, then one each to the largest remainders.

    Args:
        total: at least 0.
        weights: at least 0, with a positive sum, shape ``(n,)``.

    Returns:
        Whole numbers that sum to ``total``, shape ``(n,)``; equal remainders are served in order.

    Example:
        >>> share_out(10, np.array([1, 1, 1])).tolist()
        [4, 3, 3]
    """
    quotas = total * np.asarray(weights, dtype=np.float64) / np.sum(weights, dtype=np.float64)
    counts = np.floor(quotas).astype(np.int64)
    # Rounding can lift a quota over the whole number that it should be, so the rest may also be negative.
    rest = total - int(counts.sum())
    order = np.argsort(-(quotas - counts), kind="stable")
    if rest >= 0:
        counts[order[:rest]] += 1
    else:
        counts[[i for i in order[::-1] if counts[i] > 0][:-rest]] -= 1
    return counts
