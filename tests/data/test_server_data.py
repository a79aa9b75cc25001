"""What the server may own: a part that no client gets, or data from elsewhere; never a row of the test part."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.core.errors import ConfigError, DataError, FedfuseError
from fedfuse.core.examples import Examples
from fedfuse.data import Dataset, federate, from_clients
from fedfuse.data.partitions import Column, Iid
from fedfuse.data.server import NO_LABEL, HeldOut, server_inputs


def _dataset(n: int = 40) -> Dataset:
    """Feature 0 is the row, so that every example can be traced; test rows are others."""
    x = torch.stack([torch.arange(float(n)), torch.ones(n)], dim=1)
    test = Examples(x[:4] + 1000, torch.arange(min(n, 4)))
    return Dataset(Examples(x, torch.arange(n) % 4), test, tuple("abcd"), {"site": np.arange(n) % 2})


def _rows(examples: Examples) -> list[int]:
    return [int(row) for row in examples.x[:, 0].tolist()]


@given(st.integers(4, 60), st.data(), st.integers(0, 3))
def test_a_held_out_part_is_the_server_s_alone(n: int, data: st.DataObject, seed: int) -> None:
    count = data.draw(st.integers(1, n - 1))
    made = federate(_dataset(n), Iid(num_clients=1), seed=seed, normalize="none", server=HeldOut(num_examples=count))
    assert made.server is not None
    held = _rows(made.server)
    assert len(held) == count
    assert held == sorted(set(held))
    assert set(held) | set(made.positions["client_0"].tolist()) == set(range(n))
    assert not set(held) & set(made.positions["client_0"].tolist())


def test_a_fraction_is_rounded_and_the_seed_draws() -> None:
    parts = [
        federate(_dataset(), Iid(num_clients=2), seed=seed, normalize="none", server=HeldOut(fraction=0.1)).server
        for seed in (0, 0, 1)
    ]
    assert all(part is not None and len(part) == 4 for part in parts)
    rows = [_rows(part) for part in parts if part is not None]
    assert rows[0] == rows[1] != rows[2]


def test_labels_are_hidden_unless_the_server_knows_them() -> None:
    held = HeldOut(num_examples=8)
    hidden = federate(_dataset(), Iid(num_clients=2), seed=0, normalize="none", server=held).server
    known = federate(
        _dataset(), Iid(num_clients=2), seed=0, normalize="none", server=held, server_is_labelled=True
    ).server
    assert hidden is not None
    assert known is not None
    assert hidden.y.tolist() == [NO_LABEL] * 8
    assert known.y.tolist() == [row % 4 for row in _rows(known)]


def test_columns_stay_with_their_rows() -> None:
    made = federate(_dataset(), Column(column="site"), seed=0, normalize="none", server=HeldOut(num_examples=11))
    for site, rows in made.positions.items():
        assert {row % 2 for row in rows.tolist()} == {int(site)}


def test_the_server_s_data_is_normalised_like_the_clients() -> None:
    made = federate(_dataset(), Iid(num_clients=2), seed=0, server=HeldOut(fraction=0.25))
    assert made.server is not None
    mean, std = made.normalization.mean[0], made.normalization.std[0]
    raw = made.server.x[:, 0] * std + mean
    assert torch.allclose(raw, raw.round(), atol=1e-4)


def test_rows_that_stand_in_the_test_part_are_never_held_out() -> None:
    source = _dataset(10)
    repeated = Dataset(source.train, source.train.subset(range(6)), source.class_names)
    made = federate(repeated, Iid(num_clients=1), seed=0, normalize="none", server=HeldOut(num_examples=4))
    assert made.server is not None
    assert _rows(made.server) == [6, 7, 8, 9]
    with pytest.raises(DataError) as error:
        federate(repeated, Iid(num_clients=1), seed=0, server=HeldOut(num_examples=5))
    assert str(error.value) == (
        "the server would get 5 training examples, but only 4 are not in the test part too\n"
        "  where: data.server\n  fix:   give it fewer, or take the repeated rows out"
    )


def test_data_from_elsewhere_must_fit_and_hold_no_test_row() -> None:
    source = _dataset()
    assert source.test is not None
    apart = Examples(torch.full((3, 2), 7.5), torch.zeros(3, dtype=torch.int64))
    made = federate(source, Iid(num_clients=2), seed=0, normalize="none", server=apart)
    assert made.server is not None
    assert torch.equal(made.server.x, apart.x)
    assert sum(len(rows) for rows in made.positions.values()) == 40
    leaking = Examples(torch.cat([apart.x, source.test.x[2:3]]), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(DataError) as error:
        federate(source, Iid(num_clients=2), seed=0, server=leaking)
    assert str(error.value) == (
        "row 3 of the server's data is row 2 of the test part\n"
        "  where: data.server\n"
        "  fix:   take it out: the test part is for the report only; "
        "data: {server: {fraction: 0.1}} holds out training rows instead"
    )
    with pytest.raises(DataError) as error:
        federate(source, Iid(num_clients=2), seed=0, server=Examples(torch.zeros(3, 5), torch.zeros(3)))
    assert str(error.value) == (
        "the server's inputs have shape (5,) and the clients' (2,)\n"
        "  where: data.server\n"
        "  fix:   bring both to one shape: images by resize, or by the source's settings size and channels"
    )


def test_a_program_s_own_server_data() -> None:
    clients = [(torch.zeros(2, 3), torch.tensor([0, 1]))]
    for given_data in (torch.ones(4, 3), np.ones((4, 3)), (torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))):
        made = from_clients(clients, server=given_data, normalize="none")
        assert made.server is not None
        assert made.server.x.tolist() == [[1.0] * 3] * 4
        assert made.server.y.tolist() == [NO_LABEL] * 4
    assert from_clients(clients).server is None
    with pytest.raises(DataError) as error:
        server_inputs(torch.zeros(0, 3))
    assert str(error.value) == ("the data set is empty\n  where: server_data\n  fix:   give it at least one example")
    with pytest.raises(DataError, match="this is no data set") as error:
        server_inputs(3)
    assert error.value.where == "server_data"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {},
            (
                "the size of the server's part is missing\n  where: data.server\n"
                "  fix:   give either fraction: 0.1 or num_examples: 500"
            ),
        ),
        (
            {"fraction": 0.1, "num_examples": 3},
            (
                "the size of the server's part is given twice\n  where: data.server\n"
                "  fix:   give either fraction: 0.1 or num_examples: 500"
            ),
        ),
        (
            {"fraction": 1.0},
            "fraction must be in [0, 1), not 1.0\n  where: data.server.fraction\n  fix:   0.1 means one tenth",
        ),
        (
            {"num_examples": 0},
            (
                "num_examples must be above 0, not 0\n  where: data.server.num_examples\n"
                "  fix:   leave data.server out for a server without data"
            ),
        ),
    ],
)
def test_sizes_that_cannot_be(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        HeldOut(**settings)  # type: ignore[arg-type]
    assert str(error.value) == message


def test_the_clients_must_keep_something() -> None:
    with pytest.raises(FedfuseError) as error:
        federate(_dataset(4), Iid(num_clients=1), seed=0, server=HeldOut(num_examples=4))
    assert str(error.value) == (
        "the server would get 4 of 4 training examples, and the clients none\n"
        "  where: data.server\n  fix:   give it fewer, or use more data"
    )
