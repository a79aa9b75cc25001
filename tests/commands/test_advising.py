"""Where the advice is read from: a folder, a file, or the comparisons of a configuration."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedfuse.commands.advising import advise_on, boards_of
from fedfuse.core.errors import ConfigError
from fedfuse.experiment import comparison_name, read_config, resolve

CONFIG: dict[str, Any] = {"data": {"source": "digits"}, "server": {"threads": 1}}
ROW = {"method": "fedavg", "accuracy_mean": 0.5, "num_seeds": 1, "upload_bytes": 10}


def _board(folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    (folder / "board.json").write_text(json.dumps({"rows": [ROW], **changes}), encoding="utf-8")
    return folder


def test_a_folder_and_its_file_say_the_same(tmp_path: Path) -> None:
    folder = _board(tmp_path / "compared")
    lines = advise_on(folder, max_upload_bytes=4096)
    assert lines == advise_on(folder / "board.json", max_upload_bytes=4096)
    assert lines == [
        "constraints: at most 4 KiB up per client",
        f"from {folder}:",
        (
            "Choose FedAvg: 50.0 % test accuracy with one seed, 10 B up per client. "
            "No other method that was measured fits."
        ),
        "The advice is read from measured test accuracy on this data; it predicts nothing for other data.",
    ]


def test_a_configuration_finds_its_comparisons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    checked = read_config(CONFIG)
    name = comparison_name(checked, {})
    with pytest.raises(ConfigError) as error:
        boards_of(Path("c.yaml"))
    assert str(error.value) == (
        f"this configuration was not compared yet\n  where: runs/{name}\n"
        "  fix:   run: fedfuse compare c.yaml --methods local,fedavg,ensemble,fusefl"
    )
    _board(tmp_path / "runs" / name)
    _board(tmp_path / "runs" / comparison_name(checked, {"data.limit": [1]}))
    _board(tmp_path / "runs" / "named", config=resolve(checked))
    _board(tmp_path / "runs" / "other", config={**resolve(checked), "data": {"source": "npz"}})
    (tmp_path / "runs" / "broken").mkdir()
    (tmp_path / "runs" / "broken" / "board.json").write_text("{", encoding="utf-8")
    assert [file.parent.name for file in boards_of(Path("c.yaml"))] == [name, f"{name}-by-data.limit", "named"]


def test_a_folder_without_a_comparison(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        boards_of(tmp_path)
    assert str(error.value) == (
        f"there is no comparison here: board.json is missing\n  where: {tmp_path}\n"
        "  fix:   name the folder of a `fedfuse compare`, or a configuration"
    )
