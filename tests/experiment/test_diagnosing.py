"""The diagnosis of a configuration: what it asks, what it writes, and how far it is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import fedfuse
from fedfuse.core.artifact import Artifact
from fedfuse.core.errors import ConfigError
from fedfuse.experiment.diagnosing import diagnose, diagnose_run


def test_the_clients_train_once_for_the_diagnosis_and_for_a_later_run(config: dict[str, Any], tmp_path: Path) -> None:
    table = diagnose(config, out=tmp_path)
    assert json.loads((tmp_path / "diagnosis.json").read_text()) == table
    (setting,) = table["settings"]
    assert (setting["varied"], setting["measured"], table["method"]) == ({}, None, None)
    assert setting["diagnosis"]["num_clients"] == 3
    assert setting["predicted_gaps"] == [setting["diagnosis"]["predicted_gap"]]
    assert [line["from"] for line in setting["lines"]] == ["start", "client_0", "client_0", "client_1"]
    method = {"name": "fedavg", "local": config["method"]["local"]}
    fedfuse.run({**config, "method": method}, out=tmp_path)
    entries = json.loads((tmp_path / "ledger.json").read_text())["entries"]
    assert [entry["from_journal"] for entry in entries] == [True, True, True]


def test_both_ways_are_measured_on_every_value(config: dict[str, Any], tmp_path: Path) -> None:
    table = diagnose(config, num_rounds=2, measure=True, vary=["model.width=4,8"], seeds=2, out=tmp_path)
    assert [setting["varied"] for setting in table["settings"]] == [{"model.width": 4}, {"model.width": 8}]
    # 64 pixels to w, w to w, w to 10 classes, each with its biases.
    sizes = [setting["diagnosis"]["num_parameters"] for setting in table["settings"]]
    assert sizes == [65 * w + (w + 1) * w + (w + 1) * 10 for w in (4, 8)]
    assert (table["method"], table["seeds"]) == ("fedavg", [2, 3])
    for setting in table["settings"]:
        measured, folder = setting["measured"], tmp_path / f"width={setting['varied']['model.width']}"
        for seed, distance in zip((2, 3), measured["distances"], strict=True):
            states = [
                Artifact.read(folder / way / f"seed_{seed}" / "artifact").state for way in ("one_round", "2_rounds")
            ]
            squares = [(states[0][name] - states[1][name]).double().square().sum() for name in states[0]]
            assert distance == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-5)
        accuracies = [
            json.loads((folder / way / "seed_2" / "result.json").read_text())["accuracy"]
            for way in ("one_round", "2_rounds")
        ]
        assert [measured[f"accuracy_{way}_by_seed"][0] for way in ("one", "many")] == accuracies
        gaps = [
            many - one
            for one, many in zip(measured["accuracy_one_by_seed"], measured["accuracy_many_by_seed"], strict=True)
        ]
        assert measured["accuracy_gap"] == pytest.approx(sum(gaps) / 2)
        assert measured["upload_bytes_many"] > 1.5 * measured["upload_bytes_one"]


def test_the_same_command_asks_nobody_again(config: dict[str, Any], tmp_path: Path) -> None:
    class Heard(fedfuse.experiment.Observer):
        found = 0
        ended = 0

        def run_found(self, *facts: Any) -> None:
            self.found += 1

        def run_ended(self, *facts: Any) -> None:
            self.ended += 1

    first, again = Heard(), Heard()
    one = diagnose(config, out=tmp_path, observer=first)
    assert (first.found, first.ended) == (0, 1)
    assert diagnose(config, out=tmp_path, observer=again) == one
    assert (again.found, again.ended) == (1, 0)


def test_a_method_of_fedavg_s_kind_is_measured_itself(config: dict[str, Any]) -> None:
    config["method"] = {"name": "fedprox", "local": config["method"]["local"]}
    assert diagnose(config, num_rounds=2, measure=True)["method"] == "fedprox"


def test_a_finished_run_of_the_probe_is_diagnosed_where_it_lies(config: dict[str, Any], tmp_path: Path) -> None:
    config["method"] = {"name": "one_round_probe", "local": config["method"]["local"]}
    fedfuse.run(config, out=tmp_path / "run")
    table = diagnose_run(tmp_path / "run", 5)
    assert table["num_rounds"] == 5
    assert (
        table["settings"][0]["diagnosis"]
        == diagnose(config, num_rounds=5, out=tmp_path / "o")["settings"][0]["diagnosis"]
    )
    assert json.loads((tmp_path / "run" / "diagnosis.json").read_text()) == table


def test_another_folder_is_no_run_of_the_probe(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        diagnose_run(tmp_path)
    assert str(caught.value) == (
        "this is no finished run of the method one_round_probe\n"
        f"  where: {tmp_path}\n"
        "  fix:   run it: fedfuse run CONFIG --set method.name=one_round_probe, or diagnose a configuration"
    )


def test_what_cannot_be_diagnosed_is_told_before_anybody_trains(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        diagnose(config, overrides=["data.validation_fraction=0"])
    assert str(caught.value) == (
        "losses are measured on the clients' validation parts, and there are none\n"
        "  where: data.validation_fraction\n"
        "  fix:   set it above 0, such as 0.1"
    )
    with pytest.raises(ConfigError) as caught:
        diagnose(config, num_rounds=1)
    assert str(caught.value) == (
        "one round is held against 1\n  where: --rounds\n  fix:   give the rounds of the other way, 2 or more"
    )
    remote = {"source": "remote", "class_names": ["a", "b"], "input_shape": [4]}
    with pytest.raises(ConfigError) as caught:
        diagnose({**config, "data": remote})
    assert str(caught.value) == (
        "the clients of this configuration are elsewhere\n"
        "  where: data.source\n"
        "  fix:   run fedfuse serve with method: {name: one_round_probe}, then fedfuse diagnose on its folder"
    )
    with pytest.raises(ConfigError, match="2 local epochs cannot be divided over 10 exchanges"):
        diagnose(config, measure=True)
