"""Which neuron of one network is which neuron of another: assignment and exact optimal transport.

Channels may come in blocks, as group normalisation makes them: blocks are matched with blocks, and channels inside.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fedfuse.core.errors import ModelError

# Above this size an assignment of repeated points costs more than the linear programme.
_MOST_REPEATED = 2048


def squared_distances(targets: Tensor, sources: Tensor) -> Tensor:
    """Squared Euclidean distances between two sets of vectors.

    Args:
        targets: shape ``(m, d)``.
        sources: shape ``(n, d)``.

    Returns:
        Shape ``(m, n)``, float64, 0 or more.

    Example:
        >>> squared_distances(torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0], [1.0, 0.0]])).tolist()
        [[25.0, 1.0]]
    """
    x, y = targets.double(), sources.double()
    found = x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T
    return found.clamp(min=0)


def assignment(cost: Tensor, num_blocks: int = 1) -> Tensor:
    """The permutation of least cost.

    Args:
        cost: of giving source j to target i, shape ``(n, n)``.
        num_blocks: equal blocks of neighbours that stay together; 1 is no constraint. With blocks the result is still
            the best there is: the best inside each pair of blocks, and the best pairs of blocks.

    Returns:
        The source of each target, shape ``(n,)``, int64.

    Raises:
        ModelError: the cost is not square, or not finite, or cannot be cut into so many blocks.

    Example:
        >>> assignment(torch.tensor([[1.0, 0.0], [0.0, 9.0]])).tolist()
        [1, 0]
    """
    _check(cost, num_blocks)
    if cost.shape[0] != cost.shape[1]:
        raise ModelError(
            f"{cost.shape[1]} channels cannot be assigned to {cost.shape[0]}",
            fix="use otfusion for clients with different widths",
        )
    return coupling(cost, num_blocks).argmax(1)


def coupling(cost: Tensor, num_blocks: int = 1) -> Tensor:
    """The transport plan of least cost between uniform masses, solved exactly.

    For as many sources as targets it is a permutation matrix.

    Args:
        cost: of moving source j to target i, shape ``(m, n)``.
        num_blocks: equal blocks of neighbours that stay together, as many on both sides; 1 is no constraint.

    Returns:
        Share of target i that comes from source j, shape ``(m, n)``, float64; rows sum to 1, columns to ``m / n``.

    Raises:
        ModelError: the cost is not finite, or cannot be cut into so many blocks.

    Example:
        >>> coupling(torch.tensor([[0.0, 0.0, 9.0, 9.0], [9.0, 9.0, 0.0, 0.0]])).tolist()
        [[0.5, 0.5, 0.0, 0.0], [0.0, 0.0, 0.5, 0.5]]
    """
    _check(cost, num_blocks)
    if num_blocks == 1:
        return _transport(cost.double())
    m, n = cost.shape[0] // num_blocks, cost.shape[1] // num_blocks
    # (m, n) -> (blocks, blocks, rows in a block, columns in a block)
    parts = cost.double().reshape(num_blocks, m, num_blocks, n).transpose(1, 2)
    inside = torch.stack([torch.stack([_transport(part) for part in row]) for row in parts])
    between = _transport((inside * parts).sum((2, 3)))
    return (between[:, :, None, None] * inside).transpose(1, 2).reshape(cost.shape)


def _check(cost: Tensor, num_blocks: int) -> None:
    if cost.shape[0] % num_blocks or cost.shape[1] % num_blocks:
        raise ModelError(
            f"{cost.shape[0]} and {cost.shape[1]} channels cannot be cut into {num_blocks} blocks",
            fix="use group normalisation with a number of groups that divides the channels",
        )
    if not bool(cost.isfinite().all()):
        raise ModelError("a cost of matching is not finite", fix="check the clients' weights")


def _transport(cost: Tensor) -> Tensor:
    from scipy.optimize import linear_sum_assignment

    m, n = cost.shape
    least = math.lcm(m, n)
    if least > _MOST_REPEATED and m != n:
        return _programme(cost)
    # Points of mass 1/m, each repeated k times, are as good as k m points of mass 1 / (k m).
    rows, columns = least // m, least // n
    repeated = cost.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    targets, sources = linear_sum_assignment(repeated.numpy())
    plan = torch.zeros(m, n, dtype=torch.float64)
    index = (torch.from_numpy(targets) // rows, torch.from_numpy(sources) // columns)
    return plan.index_put_(index, torch.tensor(1.0 / rows, dtype=torch.float64), accumulate=True)


def _programme(cost: Tensor) -> Tensor:
    import numpy as np
    from scipy import sparse
    from scipy.optimize import linprog

    m, n = cost.shape
    sums = sparse.vstack(
        [
            sparse.kron(sparse.eye_array(m), np.ones((1, n))),
            sparse.kron(np.ones((1, m)), sparse.eye_array(n)),
        ]
    ).tocsr()
    # One of the sums follows from the others.
    wanted = np.concatenate([np.ones(m), np.full(n, m / n)])
    solved = linprog(cost.numpy().ravel(), A_eq=sums[:-1], b_eq=wanted[:-1], method="highs")
    if not solved.success:
        raise ModelError(f"the transport was not solved: {solved.message}", fix="use clients of equal widths")
    plan = torch.from_numpy(solved.x).reshape(m, n).clamp(min=0)
    return plan / plan.sum(1, keepdim=True)
