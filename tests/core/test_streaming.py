"""Safetensors files written tensor by tensor."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from fedfuse.core.errors import JournalError, PayloadError
from fedfuse.core.payload import Payload
from fedfuse.core.streaming import TensorWriter

DTYPES = [torch.float64, torch.int64, torch.float32, torch.bfloat16, torch.float16, torch.uint8, torch.bool]


@given(st.lists(st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=4)), max_size=6))
@settings(max_examples=30, deadline=None)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, looks: list[tuple[torch.dtype, list[int]]]
) -> None:
    path = tmp_path_factory.mktemp("written") / "x.safetensors"
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t.{n}": torch.randint(0, 2, shape, generator=generator).to(dtype) for n, (dtype, shape) in enumerate(looks)
    }
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    with TensorWriter(path, [*order, "never"]) as writer:
        for name in order:
            writer.put(name, tensors[name])
    for found in (load_file(path), Payload.decode(path.read_bytes())):
        assert set(found) == set(tensors)
        for name, tensor in tensors.items():
            value = found[name]
            assert isinstance(value, torch.Tensor)
            assert value.dtype == tensor.dtype
            assert value.equal(tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_parts_of_larger_tensors_are_written_as_they_look(tmp_path: Path) -> None:
    whole = torch.arange(12.0).view(3, 4)
    with TensorWriter(tmp_path / "x", ["t", "v"], {"made_by": "us"}) as writer:
        writer.put("t", whole.T)
        writer.put("v", whole[1:, 1])
    found = load_file(tmp_path / "x")
    assert found["t"].equal(whole.T)
    assert found["v"].tolist() == [5.0, 9.0]
    raw = (tmp_path / "x").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    assert length % 8 == 0
    assert json.loads(raw[8 : 8 + length])["__metadata__"] == {"format": "pt", "made_by": "us"}


def test_nothing_is_left_of_what_was_not_finished(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")

    def write_twice() -> None:
        with TensorWriter(tmp_path / "x", ["a"]) as writer:
            writer.put("a", torch.ones(3))
            writer.put("a", torch.ones(3))

    with pytest.raises(PayloadError):
        write_twice()
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_what_cannot_be_written(tmp_path: Path) -> None:
    with TensorWriter(tmp_path / "x", ["a"]) as writer:
        writer.put("a", torch.ones(3))
        for name, tensor, said in (
            ("a", torch.ones(3), '"a" is written twice'),
            ("b", torch.ones(3).double(), '"b" has wider elements than the tensor before it'),
            ("c", torch.ones(3, dtype=torch.complex64), '"c" is a tensor of torch.complex64 (3,)'),
            ("d*", torch.ones(3), "'d*' is no key of a payload"),
        ):
            with pytest.raises(PayloadError) as caught:
                writer.put(name, tensor)
            assert caught.value.what == said
    assert set(load_file(tmp_path / "x")) == {"a"}
    with pytest.raises(PayloadError, match="there are more tensors than one file can name"):
        TensorWriter(tmp_path / "x", (f"{n:0500}" for n in range(40_000)))


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(JournalError) as caught:
        with TensorWriter(tmp_path / "x", ["a"]) as writer:
            writer.put("a", torch.ones(3))
    assert str(caught.value) == (
        f"cannot write: No space left on device\n  where: {tmp_path / 'x'}\n"
        "  fix:   free disk space or name another folder, then run the same command again"
    )
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="cannot write: "):
        with TensorWriter(tmp_path / "file" / "x", ["a"]):
            pass
