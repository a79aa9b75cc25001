"""Distances between whole models, redone by hand."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from fedfuse.core.payload import Payload, PayloadFile
from fedfuse.rules import distances
from fedfuse.rules.distances import squared_distances
from fedfuse.rules.reading import Upload

KEYS = ["d", "h", "w"]


def uploads(*rows: list[float]) -> list[Upload]:
    return [Upload({"w": torch.tensor(w), "b": torch.tensor(b), "n": torch.tensor(7)}) for w, *b in map(_floats, rows)]


def _floats(row: list[float]) -> list[float]:
    return [float(value) for value in row]


def test_all_tensors_count_together() -> None:
    found = squared_distances(uploads([0, 0, 0], [3, 4, 0], [0, 0, 12]), ["b", "n", "w"])
    assert found.tolist() == [[0, 25, 144], [25, 0, 169], [144, 169, 0]]
    assert found.dtype == torch.float64


def test_integers_count_in_no_distance() -> None:
    pair = [Upload({"steps": torch.tensor(k), "w": torch.tensor([1.0])}) for k in (1, 900)]
    assert squared_distances(pair, ["steps", "w"]).tolist() == [[0, 0], [0, 0]]


def test_one_wild_client_costs_the_others_no_digit() -> None:
    found = squared_distances(uploads([1, 0], [2, 0], [3e38, 0]), ["w"])
    assert found[0, 1] == 1
    assert found[0, 2] > 1e76


def test_what_cannot_be_told_is_as_far_as_can_be() -> None:
    found = squared_distances(uploads([1, 0], [math.nan, 0], [math.inf, 0]), ["w"])
    assert found.tolist() == [[0, 1e300, 1e300], [1e300, 0, 1e300], [1e300, 1e300, 0]]


def test_parts_and_files_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(0)
    payloads = [
        Payload({"w": torch.randn(3000, generator=g), "h": torch.randn(9).bfloat16(), "d": torch.randn(5).double()})
        for _ in range(4)
    ]
    files = []
    for number, payload in enumerate(payloads):
        (tmp_path / str(number)).write_bytes(payload.encode())
        files.append(Upload(PayloadFile(tmp_path / str(number))))
    whole = squared_distances([Upload(payload) for payload in payloads], KEYS)
    assert squared_distances(files, KEYS).equal(whole)
    monkeypatch.setattr(distances, "_PART_BYTES", 1)
    monkeypatch.setattr(distances, "_FEWEST_ELEMENTS", 7)
    torch.testing.assert_close(squared_distances(files, KEYS), whole, rtol=1e-12, atol=0)
    stack = torch.stack([torch.cat([p.tensor(key).double() for key in KEYS]) for p in payloads])
    torch.testing.assert_close(whole, torch.cdist(stack, stack).square(), rtol=1e-6, atol=1e-6)
