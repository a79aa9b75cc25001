"""A model from a user's Python file: described, so that nobody else needs the file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import fedfuse
from fedfuse import models
from fedfuse.core.errors import ConfigError, FedfuseError
from fedfuse.experiment import read_config
from fedfuse.experiment.agreement import Agreement
from fedfuse.experiment.contributing import agreement_of

FILE = """
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(64, 16), nn.Linear(16, 10)

    def forward(self, x):
        return self.second(self.first(x.flatten(1)).relu())

def build():
    return Net()

number = 3
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "net.py").write_text(FILE)
    return tmp_path / "net.py"


def test_the_file_is_needed_by_nobody_else(path: Path) -> None:
    config = {
        "data": {"source": "digits", "limit": 100, "test_limit": 50, "partition": {"scheme": "iid", "num_clients": 2}},
        "model": {"family": "python", "path": str(path)},
        "method": {"name": "fedavg", "local": {"num_epochs": 1}},
    }
    result = fedfuse.run(config, out=path.parent / "run")
    agreement = agreement_of(read_config(config)).encode()
    path.unlink()
    fedfuse.load(path.parent / "run")
    assert result.module()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    state = Agreement.decode(agreement).model.build().state_dict()
    assert [tuple(tensor.shape) for tensor in state.values()] == [(16, 64), (16,), (10, 16), (10,)]


def test_weights_are_drawn_from_the_seed(path: Path) -> None:
    def digest(seed: int) -> str:
        return models.spec("python", {"path": str(path)}, input_shape=(1, 8, 8), num_classes=10, seed=seed).digest

    assert digest(0) == digest(0) != digest(1)


@pytest.mark.parametrize(
    ("settings", "text", "message"),
    [
        ({"path": "{folder}/nothing.py"}, FILE, "there is no such file"),
        ({"function": "bild"}, FILE, 'the file has no class or function "bild"'),
        ({"function": "number"}, FILE, 'the file has no class or function "number"'),
        ({}, "1/0", "the file cannot be run: ZeroDivisionError: division by zero"),
        ({}, "def build(): return 3", "the model's function gave a int"),
        ({}, FILE.replace("64", "63"), "the model cannot take an input of shape"),
    ],
)
def test_errors(path: Path, settings: dict[str, str], text: str, message: str) -> None:
    path.write_text(text)
    table = {"path": str(path), **{key: value.format(folder=path.parent) for key, value in settings.items()}}
    with pytest.raises(FedfuseError, match=message):
        models.spec("python", table, input_shape=(1, 8, 8), num_classes=10, seed=0)
    with pytest.raises(ConfigError, match='setting "path" is missing'):
        models.spec("python", {}, input_shape=(1, 8, 8), num_classes=10, seed=0)
