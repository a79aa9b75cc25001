"""``fedfuse certs`` says what to hand to whom."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedfuse.commands.certs import make
from fedfuse.core.errors import ConfigError


def test_it_says_what_to_hand_to_whom(tmp_path: Path) -> None:
    folder = tmp_path / "certs"
    said = make(folder, ["hospital-a"], ["fed.example.org"], valid_days=9)
    assert said == (
        f"{folder}: certificates and keys for a trial; whoever reads the .key files can speak in their name\n"
        f"to hospital-a, and to nobody else: the folder {folder / 'hospital-a'} "
        "(ca.pem, hospital-a.key, hospital-a.key.signing)\n"
        f"on the server:  fedfuse serve federation.yaml --address 0.0.0.0:9092 --certs {folder} --out runs/first\n"
        "at hospital-a:  fedfuse join --server fed.example.org:9092 --name hospital-a --data FILE "
        "--ca ca.pem --key hospital-a.key --preview"
    )


def test_nothing_to_make_is_a_mistake(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing is to be made"):
        make(tmp_path, [], [], valid_days=9)
