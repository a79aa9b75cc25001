"""Hostile clients in a simulation: who attacks, what is measured, and what is reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fedfuse
from fedfuse.core.errors import ConfigError
from fedfuse.experiment import read_config, resolve
from fedfuse.experiment.setting import Loader


@pytest.fixture
def attacked(config: dict[str, Any]) -> dict[str, Any]:
    """Five clients alike, so that they can be compared."""
    config["data"] |= {"limit": 400, "partition": {"scheme": "iid", "num_clients": 5}}
    config["method"] = {"name": "fedavg", "local": {"num_epochs": 6, "batch_size": 16, "learning_rate": 0.05}}
    return config


def test_an_honest_run_says_nothing_of_attacks(attacked: dict[str, Any]) -> None:
    assert "attack" not in resolve(read_config(attacked))
    result = fedfuse.run(attacked)
    assert "attack" not in result.facts
    assert result.facts["suspects"] == []


def test_an_attack_is_part_of_the_resolved_configuration(attacked: dict[str, Any]) -> None:
    attacked["attack"] = {"name": "sign_flip"}
    resolved = resolve(read_config(attacked))
    assert resolved["attack"] == {"name": "sign_flip", "clients": 1, "factor": 4.0}
    assert resolve(read_config(resolved)) == resolved


def test_settings_of_the_attack_are_checked(attacked: dict[str, Any]) -> None:
    attacked["attack"] = {"name": "sign_flip", "facter": 2}
    with pytest.raises(ConfigError) as caught:
        resolve(read_config(attacked))
    assert str(caught.value) == (
        'unknown setting "facter"\n  where: attack.facter\n  fix:   did you mean "factor"? known: clients, factor, name'
    )


def test_a_forged_upload_is_found_and_costs_no_honest_client_its_name(attacked: dict[str, Any], tmp_path: Path) -> None:
    attacked["attack"] = {"name": "scaled", "clients": ["client_3"]}
    result = fedfuse.run(attacked, out=tmp_path / "run")
    assert result.facts["attack"] == {"name": "scaled", "clients": ["client_3"], "success": None}
    (suspect,) = result.facts["suspects"]
    assert (suspect["client"], suspect["exchange"]) == ("client_3", "local_models")
    assert suspect["reason"].startswith("it goes ")
    assert suspect["numbers"]["ratio"] > 5
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["client"] for line in lines if line.get("event") == "suspect"] == ["client_3"]
    page = result.report().read_text()
    assert "Uploads that look wrong" in page
    assert "What one client sent looks wrong." in page
    assert "Who attacked" in page


def test_the_honest_journal_does_not_answer_for_a_hostile_client(attacked: dict[str, Any], tmp_path: Path) -> None:
    fedfuse.compare(attacked, ["fedavg"], out=tmp_path)
    before = len(list((tmp_path / "journal").glob("*.json")))
    attacked["attack"] = {"name": "free_rider", "clients": 2}
    fedfuse.compare(attacked, ["fedavg"], out=tmp_path)
    assert len(list((tmp_path / "journal").glob("*.json"))) == before + 2


def test_a_backdoor_is_learnt_and_its_success_measured_against_nobody(attacked: dict[str, Any]) -> None:
    attacked["attack"] = {"name": "backdoor", "clients": 0, "target": 3}
    before = fedfuse.run(attacked)
    attacked["attack"] |= {"clients": 5}
    after = fedfuse.run(attacked)
    assert before.facts["attack"]["clients"] == []
    assert before.facts["attack"]["success"] < 0.35 < after.facts["attack"]["success"]


def test_personal_models_are_attacked_one_by_one(attacked: dict[str, Any]) -> None:
    attacked["attack"] = {"name": "label_flip", "clients": 5}
    attacked["method"]["name"] = "local"
    result = fedfuse.run(attacked)
    assert result.accuracy is not None
    assert result.facts["attack"]["success"] > result.accuracy


def test_only_the_hostile_clients_hold_something_else(attacked: dict[str, Any]) -> None:
    honest = Loader(read_config(attacked)).setting(0)
    hostile = Loader(read_config({**attacked, "attack": {"name": "label_flip", "clients": ["client_4"]}})).setting(0)
    changed = [
        client_id
        for client_id, part in hostile.data.clients.items()
        if part.fingerprint != honest.data.clients[client_id].fingerprint
    ]
    assert changed == ["client_4"]


def test_who_is_removed_makes_nobody_else_hostile(attacked: dict[str, Any]) -> None:
    attacked["data"]["without"] = ["client_0"]
    attacked["attack"] = {"name": "label_flip", "clients": 2}
    setting = Loader(read_config(attacked)).setting(0)
    assert setting.hostile is not None
    assert setting.hostile.clients == ("client_0", "client_1")
    result = fedfuse.run(attacked)
    assert result.facts["attack"]["clients"] == ["client_1"]


def test_a_comparison_counts_what_looked_wrong(attacked: dict[str, Any], tmp_path: Path) -> None:
    board = fedfuse.compare(attacked, ["fedavg"], vary={"attack.name": ["none", "backdoor"]}, out=tmp_path)
    none, backdoor = board["rows"]
    assert none["attack_success_mean"] is None
    assert 0 <= backdoor["attack_success_mean"] <= 1
    assert [row["num_honest_suspects"] for row in board["rows"]] == [0, 0]


def test_a_real_federation_has_no_attack_section(attacked: dict[str, Any]) -> None:
    attacked["data"] = {"source": "remote", "input_shape": [1, 8, 8], "class_names": ["a", "b"]}
    attacked["attack"] = {"name": "none"}
    with pytest.raises(ConfigError) as caught:
        Loader(read_config(attacked)).setting(0)
    assert str(caught.value) == "attacks are for simulations\n  where: attack\n  fix:   leave this section out"
