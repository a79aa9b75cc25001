"""Data of the server's own: a part held out before clients get theirs, or a set from elsewhere; never test rows."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import Examples
from fedfuse.data.checks import check_fraction
from fedfuse.data.dataset import Dataset
from fedfuse.data.from_python import from_python
from fedfuse.data.tensors import as_inputs

NO_LABEL = -1
"""The label of every example of a server that has inputs only."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """A part of the training examples that the server keeps and no client gets.

    It is drawn without a look at the labels, as a server that collects inputs would find them; rows whose input also
    stands in the test part are never drawn.

    Args:
        fraction: share of the training examples, in (0, 1); or else
        num_examples: how many, at least 1.

    Raises:
        ConfigError: both are given or none, or a number cannot be.
    """

    fraction: float | None = None
    num_examples: int | None = None

    def __post_init__(self) -> None:
        if (self.fraction is None) == (self.num_examples is None):
            raise ConfigError(
                "the size of the server's part is " + ("given twice" if self.fraction is not None else "missing"),
                where="data.server",
                fix="give either fraction: 0.1 or num_examples: 500",
            )
        if self.fraction is not None:
            check_fraction("data.server.fraction", self.fraction)
        if not (self.fraction or self.num_examples or 0) > 0:
            name = "fraction" if self.fraction is not None else "num_examples"
            raise ConfigError(
                f"{name} must be above 0, not {getattr(self, name)}",
                where=f"data.server.{name}",
                fix="leave data.server out for a server without data",
            )

    def rows(self, dataset: Dataset, rng: np.random.Generator) -> np.ndarray:
        """Draw the server's rows.

        Args:
            dataset: its training part is drawn from.
            rng: which rows.

        Returns:
            Sorted positions, int64, at least one.

        Raises:
            DataError: nothing would be left for clients, or too few rows are free.
        """
        total = len(dataset.train)
        wanted = self.num_examples if self.fraction is None else max(1, int(total * self.fraction + 0.5))
        if wanted is None or wanted >= total:
            raise DataError(
                f"the server would get {wanted} of {total} training examples, and the clients none",
                where="data.server",
                fix="give it fewer, or use more data",
            )
        free = np.arange(total, dtype=np.int64)
        if dataset.test is not None:
            tested = set(row_digests(dataset.test.x))
            free = free[[digest not in tested for digest in row_digests(dataset.train.x)]]
        if len(free) < wanted:
            raise DataError(
                f"the server would get {wanted} training examples, but only {len(free)} are not in the test part too",
                where="data.server",
                fix="give it fewer, or take the repeated rows out",
            )
        return np.sort(rng.permutation(free)[:wanted])


def row_digests(x: Tensor) -> list[bytes]:
    """A digest of every input, for finding equal ones.

    Args:
        x: shape ``(n, *input_shape)``.

    Returns:
        16 bytes each.
    """
    rows = x.detach().cpu().contiguous().flatten(1).numpy()
    return [hashlib.blake2b(row.data, digest_size=16).digest() for row in rows]


def unlabelled(x: Tensor) -> Examples:
    """Examples of which only the inputs are known; every label is :data:`NO_LABEL`.

    Args:
        x: inputs, shape ``(n, *input_shape)``.
    """
    return Examples(x, torch.full((len(x),), NO_LABEL, dtype=torch.int64))


def server_inputs(dataset: Any) -> Examples:
    """Take a user's own data for the server; labels that it may have are left out.

    Args:
        dataset: a tensor or an array of inputs, or anything that :func:`fedfuse.data.from_python` takes.

    Returns:
        Inputs without labels.

    Raises:
        DataError: the data cannot be read, or is empty.
    """
    if isinstance(dataset, (Tensor, np.ndarray)):
        if len(dataset) == 0:
            raise DataError("the data set is empty", where="server_data", fix="give it at least one example")
        return unlabelled(as_inputs(dataset, where="server_data")[0])
    try:
        return unlabelled(from_python(dataset).x)
    except DataError as error:
        raise DataError(error.what, where="server_data", fix=error.fix) from None


def check_server_data(server: Examples, input_shape: tuple[int, ...], test: Examples | None) -> None:
    """Refuse data of the server's that does not fit the clients', or that holds a row of the test part.

    Args:
        server: the server's examples, as the source gives them.
        input_shape: of the clients' inputs.
        test: the test part, as the source gives it.

    Raises:
        DataError: shapes differ, or a row is in both.
    """
    if tuple(server.x.shape[1:]) != input_shape:
        raise DataError(
            f"the server's inputs have shape {tuple(server.x.shape[1:])} and the clients' {input_shape}",
            where="data.server",
            fix="bring both to one shape: images by resize, or by the source's settings size and channels",
        )
    if test is None:
        return
    tested = {digest: row for row, digest in enumerate(row_digests(test.x))}
    for row, digest in enumerate(row_digests(server.x)):
        if digest in tested:
            raise DataError(
                f"row {row} of the server's data is row {tested[digest]} of the test part",
                where="data.server",
                fix="take it out: the test part is for the report only; "
                "data: {server: {fraction: 0.1}} holds out training rows instead",
            )
