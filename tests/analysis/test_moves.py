"""How far and in which direction clients went, redone by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fedfuse.analysis import moves
from fedfuse.analysis.moves import Moves, measure_moves
from fedfuse.core.payload import Payload, PayloadFile
from fedfuse.rules.reading import Upload


def measured(*rows: dict[str, list[float]], starts: list[dict[str, Tensor]] | None = None) -> Moves:
    uploads = [Upload({key: torch.tensor(value) for key, value in row.items()}) for row in rows]
    return measure_moves(uploads, starts or [{}] * len(rows), sorted(rows[0]))


def test_lengths_are_over_all_tensors_from_where_each_began() -> None:
    starts = [{"a": torch.tensor([1.0, 1.0])}, {"a": torch.tensor([0.0, 5.0]), "b": torch.tensor([2.0])}]
    found = measured({"a": [4.0, 1.0], "b": [4.0]}, {"a": [0.0, 5.0], "b": [2.5]}, starts=starts)
    assert found.norms.tolist() == [5.0, 0.5]


def test_directions_are_averaged_over_tensors_whatever_their_length() -> None:
    # In "a" the two are opposite, in "b" alike, and "b" is a thousand times as long.
    found = measured({"a": [1.0], "b": [1000.0]}, {"a": [-1.0], "b": [1000.0]})
    assert found.cosines.tolist() == [0.0, 0.0]
    found = measured({"a": [1.0, 0.0]}, {"a": [0.0, 2.0]}, {"a": [3.0, 3.0]})
    half = math.sqrt(0.5)
    assert found.cosines.tolist() == pytest.approx([0.0, 0.0, half])  # of an even number the lower middle
    assert found.affinities.tolist() == pytest.approx([2 * 0.5 / 2, 2 * 0.5 / 2, 2 * 0.5])


def test_who_did_not_move_has_no_direction() -> None:
    found = measured({"a": [0.0, 0.0]}, {"a": [0.0, 2.0]}, {"a": [0.0, 1.0]})
    assert found.norms.tolist() == [0, 2, 1]
    assert math.isnan(found.cosines[0])
    assert math.isnan(found.affinities[0])
    assert found.cosines[1:].tolist() == [1, 1]


def test_noise_has_about_1_in_common_with_noise_and_shares_have_more() -> None:
    g = torch.Generator().manual_seed(0)
    noise = [{"a": torch.randn(4000, generator=g), "b": torch.randn(60, generator=g)} for _ in range(12)]
    uploads = [Upload(row) for row in noise]
    found = measure_moves(uploads, [{}] * 12, ["a", "b"])
    assert found.affinities.tolist() == pytest.approx([1] * 12, abs=0.8)
    common = torch.randn(4000, generator=g)
    uploads = [Upload({"a": row["a"] + 0.3 * common}) for row in noise]
    assert float(measure_moves(uploads, [{}] * 12, ["a"]).affinities.min()) > 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_files_and_parts_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    payloads = [Payload({"a": torch.randn(50, 30, generator=g).to(dtype)}) for _ in range(4)]
    starts = [{"a": torch.randn(50, 30, generator=g)}] * 4
    whole = measure_moves([Upload(payload) for payload in payloads], starts, ["a"])
    files = []
    for number, payload in enumerate(payloads):
        (tmp_path / str(number)).write_bytes(payload.encode())
        files.append(Upload(PayloadFile(tmp_path / str(number))))
    monkeypatch.setattr(moves, "_PART_BYTES", 1)
    monkeypatch.setattr(moves, "_FEWEST_ELEMENTS", 7)
    parted = measure_moves(files, starts, ["a"])
    for one, other in zip(vars(whole).values(), vars(parted).values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_many_clients_are_compared_with_some_of_them() -> None:
    g = torch.Generator().manual_seed(0)
    common = torch.randn(100, generator=g)
    uploads = [Upload({"a": common + 0.1 * torch.randn(100, generator=g)}) for _ in range(200)]
    uploads[77] = Upload({"a": -common})
    found = measure_moves(uploads, [{}] * 200, ["a"])
    assert found.cosines.argmin() == 77
    assert float(found.cosines[77]) < -0.9
    assert int((found.cosines > 0.9).sum()) == 199
