"""A simulation as files, and the configuration of the real federation of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fedfuse.commands.splitting import split
from fedfuse.core.errors import ConfigError, DataError
from fedfuse.experiment import read_config
from fedfuse.experiment.agreement import Agreement, open_side
from fedfuse.experiment.contributing import agreement_of, own_data
from fedfuse.experiment.setting import Loader

CONFIG: dict[str, Any] = {
    "seed": 3,
    "data": {
        "source": "digits",
        "limit": 200,
        "test_limit": 50,
        "partition": {"scheme": "dirichlet", "num_clients": 3, "dirichlet_alpha": 0.1},
    },
    "model": {"family": "cnn", "width": 4},
    "method": {"name": "fedavg"},
}


@pytest.mark.parametrize(
    "data",
    [
        {},
        {"normalize": "none"},
        {"resize": 6, "augment": "crop"},
        {"validation_fraction": 0.0},
        {"server": {"fraction": 0.2}},
        {"labels": {"3": "odd", "client_1": {"4": "even"}}},
    ],
    ids=["plain", "not normalised", "resized", "no validation", "server data", "own labels"],
)
def test_every_client_sees_the_data_of_the_simulation(data: dict[str, Any], tmp_path: Path) -> None:
    simulation = read_config({**CONFIG, "data": {**CONFIG["data"], **data}})
    files = split(simulation, tmp_path)
    real = read_config(tmp_path / "federation.yaml")
    simulated = Loader(simulation).setting(3)
    assert {path.name for path in files} >= {*(f"{name}.npz" for name in simulated.data.clients), "federation.yaml"}
    agreement = Agreement.decode(agreement_of(real).encode())
    for client_id, part in simulated.data.clients.items():
        side = open_side(agreement, client_id, own_data(real, client_id, tmp_path / f"{client_id}.npz"), home=None)
        assert side.data.fingerprint == part.fingerprint
        assert side.model.digest == simulated.model.digest
    setting = Loader(real).setting(3)
    assert setting.data.clients == {}
    assert setting.data.test is not None
    assert simulated.data.test is not None
    assert setting.data.test.fingerprint == simulated.data.test.fingerprint
    assert (setting.data.server is None) == (simulated.data.server is None)
    if setting.data.server is not None and simulated.data.server is not None:
        assert torch.equal(setting.data.server.x, simulated.data.server.x)
        assert torch.equal(setting.data.server.y, simulated.data.server.y)


def test_the_same_command_may_be_repeated_and_nothing_is_overwritten(tmp_path: Path) -> None:
    assert split(read_config(CONFIG), tmp_path) == split(read_config(CONFIG), tmp_path)
    before = (tmp_path / "client_0.npz").read_bytes()
    with pytest.raises(ConfigError, match="the file is there already"):
        split(read_config({**CONFIG, "seed": 4}), tmp_path)
    assert (tmp_path / "client_0.npz").read_bytes() == before


def test_classes_go_by_name(tmp_path: Path) -> None:
    split(read_config(CONFIG), tmp_path)
    names = np.load(tmp_path / "client_0.npz", allow_pickle=False)["y"]
    assert names.dtype.kind == "U"
    assert set(names) <= {str(digit) for digit in range(10)}


def test_data_that_are_elsewhere_cannot_be_split_or_simulated(tmp_path: Path) -> None:
    split(read_config(CONFIG), tmp_path)
    real = read_config(tmp_path / "federation.yaml")
    with pytest.raises(ConfigError, match="these data are with their owners already"):
        split(real, tmp_path / "again")
    with pytest.raises(DataError, match="the data of this federation stay with their owners"):
        Loader(real).dataset()


def wrong(tmp_path: Path, **data: Any) -> str:
    split(read_config(CONFIG), tmp_path)
    table = yaml.safe_load((tmp_path / "federation.yaml").read_text())
    with pytest.raises((ConfigError, DataError)) as caught:
        Loader(read_config({**table, "data": {**table["data"], **data}})).setting(3)
    return f"{caught.value.where}: {caught.value.what}"


def test_what_a_remote_federation_cannot_be(tmp_path: Path) -> None:
    assert wrong(tmp_path, input_shape=[]) == "data.input_shape: no input has the shape []"
    for names in ([], ["a", "b", "a"]):
        assert wrong(tmp_path, class_names=names) == (
            "data.class_names: the names of the classes are missing, or one stands twice"
        )
    assert wrong(tmp_path, server={"fraction": 0.1}) == (
        "data.server: a part of data that stay with their owners cannot be held out"
    )
    assert wrong(tmp_path, test={"path": "x.npz"}) == 'data.test.source: the setting "source" is missing'
    assert wrong(tmp_path, class_names=["cat", "dog"]).startswith("data.test: ")


def test_images_are_normalised_by_a_half_where_nothing_is_said(tmp_path: Path) -> None:
    split(read_config(CONFIG), tmp_path)
    table = yaml.safe_load((tmp_path / "federation.yaml").read_text())
    setting = Loader(read_config({**table, "data": {**table["data"], "normalize": "auto"}})).setting(3)
    assert (setting.data.normalization.mean, setting.data.normalization.std) == ((0.5,), (0.5,))
