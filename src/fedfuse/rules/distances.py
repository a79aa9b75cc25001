"""How far apart whole models are, read part by part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedfuse.rules.reading import Upload

# All clients' values of one part stay within a core's cache, unless there are very many clients.
_PART_BYTES = 4 << 20
_FEWEST_ELEMENTS = 1 << 10
# Squares of float64 overflow; what is so far away is only ever compared.
_FARTHEST = 1e300


def squared_distances(uploads: Sequence[Upload], keys: Sequence[str]) -> Tensor:
    """Squared Euclidean distances between the clients' floating-point tensors, all keys together.

    Differences are taken before they are squared, so that one client's huge values cost the others' distances no digit.
    Time grows with the square of the number of clients, memory does not grow with it.

    Args:
        uploads: one per client, of the same keys, shapes and dtypes.
        keys: full keys; integers and truth values are passed over.

    Returns:
        Shape ``(num_clients, num_clients)``, float64, symmetric, zeros on the diagonal; what cannot be told (NaN) is as
        far as can be.
    """
    num_clients = len(uploads)
    total = torch.zeros(num_clients, num_clients, dtype=torch.float64)
    step = max(_FEWEST_ELEMENTS, _PART_BYTES // (8 * num_clients))
    for key in keys:
        looks = uploads[0].looks(key)
        if looks is None or not looks[1].is_floating_point:
            continue
        length = torch.Size(looks[0]).numel()
        for start in range(0, length, step):
            part = torch.empty(min(step, length - start), dtype=looks[1])
            stack = torch.empty(num_clients, len(part), dtype=torch.float64)
            for row, upload in enumerate(uploads):
                stack[row] = upload.read(key, start, part)
            for row in range(num_clients - 1):
                total[row, row + 1 :] += (stack[row + 1 :] - stack[row]).square_().sum(1)
    return (total + total.T).nan_to_num_(nan=_FARTHEST, posinf=_FARTHEST).clamp_(max=_FARTHEST)
