"""A run and a comparison on disk, made once for all tests of the commands."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest

import fedfuse

CONFIG: dict[str, Any] = {
    "seed": 1,
    "data": {
        "source": "digits",
        "limit": 120,
        "test_limit": 60,
        "partition": {"scheme": "iid", "num_clients": 2},
    },
    "model": {"family": "cnn", "width": 4, "depth": 2},
    "method": {"name": "fusefl", "num_blocks": 2, "local": {"num_epochs": 2, "batch_size": 32}},
    "runtime": {"name": "local", "workers": 1},
    "server": {"threads": 1},
}


@pytest.fixture
def commands_config() -> dict[str, Any]:
    """A small configuration on handwritten digits."""
    return copy.deepcopy(CONFIG)


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of FuseFL."""
    folder = tmp_path_factory.mktemp("commands") / "run"
    fedfuse.run(CONFIG, out=folder)
    return folder


@pytest.fixture(scope="session")
def board_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison of two methods."""
    folder = tmp_path_factory.mktemp("commands") / "board"
    fedfuse.compare(CONFIG, ["local", "ensemble"], out=folder)
    return folder
