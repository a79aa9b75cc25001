"""Reading parts of tensors from files and from memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedfuse.core.errors import ModelError, PayloadError
from fedfuse.core.payload import Payload, PayloadFile
from fedfuse.core.registry import RULES
from fedfuse.rules import fuse_uploads, rule
from fedfuse.rules.reading import Upload, in_threads

DTYPES = [
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
]  # fmt: skip
NAMES = ["dare", "karcher", "mean", "median", "slerp", "task_arithmetic", "ties", "trimmed_mean"]


def filed(payload: Payload, path: Path) -> PayloadFile:
    path.write_bytes(payload.encode())
    return PayloadFile(path)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_part_of_every_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    whole = (torch.arange(12) % 5).to(dtype).reshape(3, 4)
    payload = Payload({"a/x": torch.ones(3), "b/x": whole, "c": 1})
    for upload in (Upload(payload), Upload(filed(payload, tmp_path / "file"))):
        assert upload.looks("b/x") == ((3, 4), dtype)
        assert upload.read("b/x", 5, torch.empty(4, dtype=dtype)).equal(whole.view(-1)[5:9])
        assert upload.looks("c") is None
        assert upload.looks("d") is None


def test_dtypes_that_have_no_place_are_read_whole(tmp_path: Path) -> None:
    whole = torch.arange(6.0).to(torch.float8_e4m3fn)
    upload = Upload(filed(Payload({"x": whole}), tmp_path / "file"))
    part = upload.read("x", 2, torch.empty(3, dtype=torch.float8_e4m3fn))
    assert upload.looks("x") == ((6,), torch.float8_e4m3fn)
    assert part.float().tolist() == [2.0, 3.0, 4.0]


def test_a_file_that_was_cut_short_while_it_was_read(tmp_path: Path) -> None:
    file = filed(Payload({"x": torch.zeros(100)}), tmp_path / "file")
    upload = Upload(file)
    file.path.write_bytes(file.path.read_bytes()[:-8])
    with pytest.raises(PayloadError) as caught:
        upload.read("x", 90, torch.empty(10))
    assert str(caught.value) == (
        f'the file ends in the middle of "x"\n  where: {tmp_path / "file"}\n  fix:   copy the file again'
    )


def states(count: int) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "empty": torch.zeros(0, 2),
            "half": torch.randn(9, generator=generator).bfloat16(),
            "mask": torch.rand(4, generator=generator) > 0.5,
            "steps": torch.randint(0, 100, (), generator=generator),
            "w": torch.randn(5, 7, generator=generator),
        }
        for _ in range(count)
    ]


def same(a: dict[str, Tensor], b: dict[str, Any]) -> bool:
    return list(a) == sorted(b) and all(a[k].equal(b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("name", NAMES)
class TestEveryRule:
    def test_files_give_the_same_as_memory_and_shapes_and_dtypes_stay(self, name: str, tmp_path: Path) -> None:
        base, *clients = (Payload(state) for state in states(4))
        files = [filed(client, tmp_path / str(position)) for position, client in enumerate(clients)]
        which = RULES.get(name)()
        inner = fuse_uploads(clients, which, group="", base=base)
        outer = fuse_uploads(files, which, group="", base=filed(base, tmp_path / "base"))
        assert same(outer, inner)
        assert {k: (v.shape, v.dtype) for k, v in inner.items()} == {
            k: (base.tensor(k).shape, base.tensor(k).dtype) for k in base
        }

    def test_one_client_that_did_not_move_comes_back(self, name: str) -> None:
        (base,) = states(1)
        assert same(fuse_uploads([base], RULES.get(name)(), group="", base=base), base)

    def test_clients_that_agree_come_back(self, name: str) -> None:
        base, one = states(2)
        everything = {"ties": {"keep_fraction": 1.0}, "dare": {"drop_fraction": 0.0}}
        fused = fuse_uploads([one] * 4, RULES.get(name)(**everything.get(name, {})), [1, 2, 1, 3], group="", base=base)
        for key, tensor in one.items():
            torch.testing.assert_close(fused[key], tensor)

    def test_the_uploads_are_left_as_they_are(self, name: str) -> None:
        base, *clients = (Payload(state) for state in states(4))
        before = [payload.digest() for payload in (base, *clients)]
        fuse_uploads(clients, RULES.get(name)(), group="", base=base)
        assert [payload.digest() for payload in (base, *clients)] == before


def test_a_difference_of_shape_is_told_before_anything_is_read(tmp_path: Path) -> None:
    files = [filed(Payload({"x": torch.zeros(n)}), tmp_path / str(n)) for n in (2, 3)]
    with pytest.raises(ModelError, match=r'upload 1 has \(3,\) torch.float32 as "x", upload 0 has \(2,\)'):
        fuse_uploads(files, RULES.get("mean")(), group="")


@pytest.mark.parametrize("name", ["mean", "task_arithmetic"])
def test_threads_change_no_bit_and_leave_torch_s_number_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, *clients = (Payload(state) for state in states(4))
    files = [filed(client, tmp_path / str(position)) for position, client in enumerate(clients)]
    wanted = fuse_uploads(clients, RULES.get(name)(), [1, 2, 3], group="", base=base)
    monkeypatch.setattr(rule, "_SUM_ELEMENTS", 3)
    monkeypatch.setattr(rule, "_MOST_OPEN", 2)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        found = fuse_uploads(files, RULES.get(name)(), [1, 2, 3], group="", base=base)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert same(found, wanted)


@pytest.mark.parametrize("num_threads", [1, 2])
def test_an_error_in_a_thread_is_raised(num_threads: int) -> None:
    def fail(item: int) -> None:
        raise PayloadError(f"item {item}")

    with pytest.raises(PayloadError, match="item 0"):
        in_threads(fail, [0, 1, 2], num_threads)
