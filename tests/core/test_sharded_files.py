"""Checkpoints of several files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from fedfuse.core.errors import PayloadError
from fedfuse.core.shards import INDEX, Shards
from fedfuse.rules.reading import Upload


@pytest.fixture
def index(tmp_path: Path) -> Path:
    save_file({"a": torch.ones(2), "b": torch.arange(6.0)}, tmp_path / "1.safetensors")
    save_file({"c": torch.full((2, 2), 7.0)}, tmp_path / "2.safetensors")
    table = {"weight_map": {"a": "1.safetensors", "b": "1.safetensors", "c": "2.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(table))
    return tmp_path / INDEX


def test_tensors_are_found_where_the_index_says(index: Path) -> None:
    shards = Shards(index)
    assert list(shards) == ["a", "b", "c"]
    assert len(shards) == 3
    assert "c" in shards
    assert "d" not in shards
    found = shards["c"]
    assert isinstance(found, torch.Tensor)
    assert found.tolist() == [[7.0, 7.0], [7.0, 7.0]]


@pytest.mark.parametrize("stays_open", [True, False])
def test_parts_are_read_from_the_right_file(index: Path, stays_open: bool) -> None:
    upload = Upload(Shards(index), stays_open=stays_open)
    assert upload.is_file
    assert upload.looks("c") == ((2, 2), torch.float32)
    assert upload.read("b", 2, torch.empty(3)).tolist() == [2.0, 3.0, 4.0]
    assert upload.read("c", 3, torch.empty(1)).tolist() == [7.0]
    upload.close()


def test_a_tensor_that_its_file_does_not_hold(index: Path) -> None:
    table = json.loads(index.read_text())
    table["weight_map"]["d"] = "2.safetensors"
    index.write_text(json.dumps(table))
    with pytest.raises(PayloadError) as caught:
        Shards(index)
    assert caught.value.what == '"2.safetensors" does not hold "d", as its index says'


@pytest.mark.parametrize("name", ["3.safetensors", "../1.safetensors", ""])
def test_files_that_are_not_beside_the_index(index: Path, name: str) -> None:
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(PayloadError) as caught:
        Shards(index)
    assert str(caught.value) == (
        f'the file "{name}" of the index is not there\n  where: {index}\n  fix:   copy the checkpoint again'
    )
