"""What ``fedfuse inspect`` says of every kind of file, whole or damaged."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfuse.commands.inspecting import describe, outline
from fedfuse.core.errors import FedfuseError
from fedfuse.core.payload import Payload
from fedfuse.core.sealing import SigningKey, write_sealed


def test_a_run(run_folder: Path) -> None:
    facts = json.loads((run_folder / "result.json").read_text())
    lines = describe(run_folder).splitlines()
    assert lines[0] == f"run {run_folder}"
    assert lines[1] == "  method      fusefl, seed 1"
    assert lines[2] == f"  accuracy    {facts['accuracy']:.2%}"
    assert lines[3] == "  clients     2"
    assert lines[4].endswith("per client in 3 exchanges")
    assert lines[5].endswith(f"digest {facts['artifact']['digest']}")


def test_a_run_with_a_missing_client_and_no_test_set(run_folder: Path, tmp_path: Path) -> None:
    facts = json.loads((run_folder / "result.json").read_text())
    facts.update(accuracy=None, missing={"client_1": "block_0: away"}, artifact=None)
    (tmp_path / "result.json").write_text(json.dumps(facts))
    text = describe(tmp_path)
    assert "  accuracy    no test set\n" in text
    assert "  clients     2, missing: {'client_1': 'block_0: away'}\n" in text
    assert "digest" not in text


def test_an_artifact(run_folder: Path) -> None:
    text = describe(run_folder / "artifact")
    digest = json.loads((run_folder / "artifact" / "fused.json").read_text())["digest"]
    assert text.startswith(f"artifact {run_folder / 'artifact'}\n")
    assert "\n  model       normalised input, then 2 fused levels of [2, 2] columns (cnn " in text
    assert f"  digest      {digest} (agrees with the content)\n" in text
    assert "  method      fusefl\n" in text
    assert "  input_shape [1, 8, 8]\n" in text
    assert "  from        block_0: client_0 " in text
    assert "  from        moments: client_0 " in text


def test_a_journal_by_itself_or_in_its_folder(run_folder: Path, tmp_path: Path) -> None:
    text = describe(run_folder / "journal")
    assert text.startswith(f"journal {run_folder / 'journal'}: 6 replies\n")
    for exchange in ("block_0", "block_1", "moments"):
        assert f"\n  {exchange:<20} 2 replies of 2 clients, " in text
    shutil.copytree(run_folder / "journal", tmp_path / "journal")
    assert describe(tmp_path).startswith(f"journal {tmp_path / 'journal'}: 6 replies\n")


def test_a_comparison(board_folder: Path) -> None:
    board = json.loads((board_folder / "board.json").read_text())
    lines = describe(board_folder).splitlines()
    assert lines[0] == f"comparison {board_folder}: 2 methods, seeds [1]"
    assert [line.split()[0] for line in lines[1:]] == ["local", "ensemble"]
    assert f"{board['rows'][1]['accuracy_mean']:.2%} +- 0.00%" in lines[2]


def test_a_file_of_tensors_and_scalars(tmp_path: Path) -> None:
    path = tmp_path / "upload.safetensors"
    payload = Payload({"model/w": torch.zeros(2, 3).bfloat16(), "num_examples": 7, "name": "a" * 200})
    path.write_bytes(payload.encode())
    assert describe(path).splitlines() == [
        f"payload {path}: 3 keys, {path.stat().st_size:,} bytes",
        "  model/w  (2, 3) bfloat16",
        f"  name  {'a' * 200!r:.80}",
        "  num_examples  7",
    ]


def test_damaged_entries_of_a_journal_are_named(run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder / "journal", tmp_path / "journal")
    keys = sorted(path.stem for path in (tmp_path / "journal").glob("*.json"))
    (tmp_path / "journal" / f"{keys[0]}.json").write_text("{")
    (tmp_path / "journal" / f"{keys[1]}.json").write_text("[]")
    (tmp_path / "journal" / f"{keys[2]}.safetensors").write_bytes(b"x")
    (tmp_path / "journal" / f"{keys[3]}.safetensors").unlink()
    text = describe(tmp_path / "journal")
    assert text.startswith(f"journal {tmp_path / 'journal'}: 2 replies\n")
    assert text.splitlines()[-4:] == [f"  damaged: {key}" for key in keys[:4]]


def refused(path: Path) -> str:
    with pytest.raises(FedfuseError) as caught:
        describe(path)
    return str(caught.value)


def test_nothing_that_fedfuse_knows(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    for path in (tmp_path, tmp_path / "notes.txt", tmp_path / "nowhere", tmp_path / "nowhere.safetensors"):
        assert refused(path) == (
            "there is nothing here that fedfuse knows\n"
            f"  where: {path}\n"
            "  fix:   name a run's folder, an artifact, an adapter, a journal, a .safetensors or a .fed file"
        )


@pytest.mark.parametrize("name", ["result.json", "board.json", "fused.json"])
@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", "3", "null", '{"rows": 3}', '{"ledger": [], "accuracy": "x"}', "\ufffd"]
)
def test_garbage_ends_in_one_clear_error(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    said = refused(tmp_path)
    assert f"\n  where: {tmp_path}" in said
    assert "\n  fix:   " in said


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 7, b"\xff" * 64, b"\x10" + b"\x00" * 7 + b"[" * 16, random.Random(0).randbytes(99)],
    ids=["empty", "short", "huge_header", "deep", "random"],
)
def test_a_file_of_any_bytes_ends_in_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "upload.safetensors"
    path.write_bytes(content)
    assert "not a payload" in refused(path)


def test_an_artifact_whose_bytes_were_changed(run_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(run_folder / "artifact", tmp_path / "artifact")
    path = tmp_path / "artifact" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    assert refused(tmp_path / "artifact") == (
        "the artifact's content does not agree with its digest\n"
        f"  where: {tmp_path / 'artifact'}\n"
        "  fix:   it was changed or damaged: copy it again"
    )


_CNN = {"kind": "model", "family": "cnn", "settings": {"width": 4}}


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (_CNN, "cnn {'width': 4}"),
        ({"kind": "normalized", "inner": _CNN}, "normalised input, then cnn {'width': 4}"),
        ({"kind": "block", "index": 1, "of": _CNN}, "block 1 of cnn {'width': 4}"),
        (
            {"kind": "ensemble", "combine": "vote", "members": [_CNN, _CNN, {"kind": "opaque"}]},
            "ensemble by vote of 2 x cnn {'width': 4}, 1 x opaque",
        ),
        (
            {"kind": "fused_blocks", "levels": [], "features": "concat"},
            "0 fused levels of [] columns (nothing), head on concat features",
        ),
        ({}, "None"),
        (3, "3"),
    ],
)
def test_a_recipe_in_a_few_words(recipe: Any, words: str) -> None:
    assert outline(recipe) == words


def test_a_contribution_and_a_request(tmp_path: Path) -> None:
    key = SigningKey.generate()
    upload = Payload({"model/w": torch.zeros(2, 3), "num_examples": 4}).encode()
    manifest = {
        "kind": "contribution",
        "client": "hospital-a",
        "exchange": "local_models",
        "facts": {"num_threads": 1},
        "declared": {"model/*": "weights"},
    }
    write_sealed(tmp_path / "a.fed", manifest, {"upload": upload}, key)
    assert describe(tmp_path / "a.fed").splitlines() == [
        f"contribution {tmp_path / 'a.fed'}: {(tmp_path / 'a.fed').stat().st_size:,} bytes, its signature fits",
        f"  signed by   {key.public_key}",
        "  client      hospital-a",
        "  exchange    local_models",
        "  num_threads 1",
        "  model/w  float32 2 x 3  (weights)",
        "  num_examples  int 4",
    ]
    write_sealed(tmp_path / "r.fed", {"kind": "request", "requests": {"b": {"task": "train"}}}, {}, key)
    assert describe(tmp_path / "r.fed").splitlines()[2:] == ["  asks        b: train"]
    (tmp_path / "bad.fed").write_bytes(b"x" * 20)
    assert "the sealed message was refused" in refused(tmp_path / "bad.fed")
