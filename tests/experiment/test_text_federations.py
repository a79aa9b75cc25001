"""Texts go through everything that data go through: a server's part, late clients, files of a real federation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedfuse.commands.splitting import split
from fedfuse.data.sources.text import Text
from fedfuse.experiment import read_config
from fedfuse.experiment.setting import Loader

pytest.importorskip("pyarrow")


@pytest.fixture
def table(tmp_path: Path) -> dict[str, Any]:
    def write(name: str, rows: list[dict[str, str]]) -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    rows = [{"task": f"t{i % 3}", "prompt": f"question {i}", "completion": f"answer {i}"} for i in range(60)]
    text = {"source": "text", "tokenizer": "bytes", "max_length": 24, "group": "task"}
    late = [{"task": "t1", "prompt": f"late {i}", "completion": "x"} for i in range(5)]
    return {
        "seed": 1,
        "data": {
            **text,
            "path": str(write("rows.jsonl", rows)),
            "test_fraction": 0.2,
            "server": {"fraction": 0.1},
            "late": {"zoe": {**text, "path": str(write("late.jsonl", late))}},
            "partition": {"scheme": "column", "column": "task"},
        },
        "model": {"family": "mlp", "width": 4},
        "method": {"name": "fedavg"},
    }


def test_a_server_part_and_a_late_client_are_tokens_too(table: dict[str, Any]) -> None:
    data = Loader(read_config(table)).setting(1).data
    assert sorted(data.clients) == ["t0", "t1", "t2", "zoe"]
    assert data.server is not None
    assert data.test is not None
    parts = [*(part.train for part in data.clients.values()), data.server, data.test]
    for part in parts:
        assert part.x.shape[1:] == (48,)
        assert bool((part.x == part.x.round()).all())
        assert (float(part.x.min()), float(part.x.max())) == (-1.0, 257.0)
    assert data.clients["zoe"].train.y.unique().tolist() == [1]
    assert data.server.y.unique().tolist() == [-1]


def test_a_federation_of_files_has_the_same_tokens(table: dict[str, Any], tmp_path: Path) -> None:
    del table["data"]["late"]
    simulated = Loader(read_config(table)).setting(1).data
    split(read_config(table), tmp_path / "real")
    real = read_config(tmp_path / "real" / "federation.yaml")
    assert (real.data.source, real.data.normalize) == ("remote", "none")
    setting = Loader(real).setting(1)
    assert setting.data.input_shape == (48,)
    assert setting.data.test is not None
    assert simulated.test is not None
    assert setting.data.test.fingerprint == simulated.test.fingerprint
    own = simulated.clients["t1"]
    with np.load(tmp_path / "real" / "t1.npz") as archive:
        rows = torch.from_numpy(archive["x"])
        assert set(archive["y"].tolist()) == {"t1"}
    wanted = torch.cat([own.train.x, own.validation.x])
    assert sorted(rows.tolist()) == sorted(wanted.tolist())


def test_texts_of_one_kind_make_a_real_federation(table: dict[str, Any], tmp_path: Path) -> None:
    for key in ("late", "group"):
        del table["data"][key]
    split(read_config(table), tmp_path / "real")
    data = Loader(read_config(tmp_path / "real" / "federation.yaml")).setting(1).data
    assert data.class_names == ("all",)


def test_the_same_texts_have_the_same_fingerprint_again(table: dict[str, Any]) -> None:
    prints = [Loader(read_config(table)).setting(1).data.clients["t0"].fingerprint for _ in range(2)]
    assert prints[0] == prints[1]
    with pytest.warns(UserWarning, match="has no test part"):
        other = Text(path=table["data"]["path"], tokenizer="bytes", max_length=25, group="task").load()
    assert other.train.fingerprint not in prints
