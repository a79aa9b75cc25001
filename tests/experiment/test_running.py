"""One method on one federation: what a run gives back and writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fedfuse
from fedfuse.core.errors import ConfigError, QuorumError
from fedfuse.core.registry import METHODS, SOURCES
from fedfuse.experiment import Observer, Result
from fedfuse.methods.ensemble import EnsembleMethod
from fedfuse.methods.fusefl import FuseFL
from fedfuse.training import LocalSGD


def test_what_is_in_a_run_s_folder(config: dict[str, Any], tmp_path: Path) -> None:
    result = fedfuse.run(config, out=tmp_path / "run")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {"artifact", "clients", "config.yaml", "journal", "ledger.json", "metrics.jsonl", "result.json"}
    facts = json.loads((tmp_path / "run" / "result.json").read_text())
    parts = {"accuracy", "artifact", "class_names", "clients", "config", "confusion", "facts"}
    parts |= {
        "ledger",
        "loss",
        "method",
        "metrics",
        "missing",
        "privacy",
        "seed",
        "suspects",
        "uploads",
        "used_server_data",
        "versions",
    }
    assert set(facts) == parts
    assert facts == json.loads(json.dumps(result.facts))
    assert (facts["method"], facts["seed"], facts["accuracy"]) == ("fusefl", 2, result.accuracy)
    assert facts["artifact"]["digest"] == result.artifact.digest()
    assert facts["config"] == yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert {"fedfuse", "python", "torch", "numpy", "system"} <= set(facts["versions"])
    assert facts["missing"] == {}
    assert result.folder == tmp_path / "run"


def test_the_accuracy_of_every_client_and_of_the_whole(config: dict[str, Any]) -> None:
    result = fedfuse.run(config)
    assert list(result.clients) == ["client_0", "client_1", "client_2"]
    assert sum(c["num_examples"] + c["num_validation"] for c in result.clients.values()) == 200
    assert sum(sum(c["label_counts"]) for c in result.clients.values()) == 200
    assert all(0 <= c["accuracy"] <= 1 for c in result.clients.values() if c["num_validation"])
    confusion = torch.tensor(result.facts["confusion"])
    assert int(confusion.sum()) == 80
    assert result.accuracy == pytest.approx(float(confusion.diag().sum()) / 80)


def test_the_accuracy_of_separate_models_is_their_mean(config: dict[str, Any]) -> None:
    result = fedfuse.run({**config, "method": {"name": "local", "local": config["method"]["local"]}})
    assert result.artifact is None
    assert result.accuracy == pytest.approx(sum(c["accuracy"] for c in result.clients.values()) / 3)
    assert {c["accuracy_kind"] for c in result.clients.values()} == {"own model on test"}
    with pytest.raises(ConfigError) as caught:
        result.module()
    assert str(caught.value) == 'the method "local" gives no common model\n  fix:   look at result.personal'


@pytest.mark.parametrize("normalize", ["auto", "none", {"mean": [0.4], "std": [0.2]}])
@pytest.mark.parametrize("method", ["fusefl", "ensemble"])
def test_the_artifact_takes_inputs_as_the_source_gives_them(
    config: dict[str, Any], tmp_path: Path, normalize: Any, method: str
) -> None:
    config["data"]["normalize"] = normalize
    section = {"name": method, "local": {"num_epochs": 2, "batch_size": 32}}
    if method == "fusefl":
        section["num_blocks"] = 2
    result = fedfuse.run({**config, "method": section}, out=tmp_path / "run")
    raw = SOURCES.get("digits")().load(limit=200, test_limit=80).test
    assert float(raw.x.min()) == 0.0
    assert float(raw.x.max()) == 1.0
    with torch.inference_mode():
        for module in (result.module(), fedfuse.load(tmp_path / "run"), fedfuse.load(tmp_path / "run" / "artifact")):
            seen = (module(raw.x).argmax(1) == raw.y).double().mean().item()
            assert seen == pytest.approx(json.loads((tmp_path / "run" / "result.json").read_text())["accuracy"])


def test_the_ledger_s_totals_are_the_sums_of_its_entries(config: dict[str, Any], tmp_path: Path) -> None:
    result = fedfuse.run(config, out=tmp_path)
    entries = json.loads((tmp_path / "ledger.json").read_text())["entries"]
    up, down = sum(e["upload_bytes"] for e in entries), sum(e["download_bytes"] for e in entries)
    assert result.ledger["upload_bytes"] == up / 3
    assert result.ledger["download_bytes"] == down / 3
    assert result.ledger["exchanges"] == len({e["exchange"] for e in entries}) == 3
    assert result.ledger["storage_bytes"] == up + result.artifact.num_bytes
    sizes = {path.stem: path.stat().st_size for path in (tmp_path / "journal").glob("*.safetensors")}
    assert sum(sizes.values()) == up
    assert result.ledger["server_seconds"] > 0
    assert result.ledger["peak_rss_bytes"] > 1 << 20


def test_curves_of_every_client_are_in_the_metrics(config: dict[str, Any], tmp_path: Path) -> None:
    fedfuse.run(config, out=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    curves = [line for line in lines if line.get("curve") == "train_loss"]
    assert {(c["exchange"], c["client"]) for c in curves} == {
        (f"block_{k}", f"client_{i}") for k in (0, 1) for i in (0, 1, 2)
    }
    assert all(len(c["values"]) == 1 for c in curves)


def test_the_same_command_continues_in_the_same_folder(config: dict[str, Any], tmp_path: Path) -> None:
    first = fedfuse.run(config, out=tmp_path)
    again = fedfuse.run(config, out=tmp_path)
    assert again.facts["artifact"] == first.facts["artifact"]
    entries = json.loads((tmp_path / "ledger.json").read_text())["entries"]
    assert all(entry["from_journal"] for entry in entries)
    assert again.ledger["upload_bytes"] == first.ledger["upload_bytes"]


def test_the_seed_changes_everything_and_may_be_given_apart(config: dict[str, Any]) -> None:
    one, two = fedfuse.run(config), fedfuse.run(config, seed=3)
    assert one.facts["artifact"]["digest"] != two.facts["artifact"]["digest"]
    assert [c["label_counts"] for c in one.clients.values()] != [c["label_counts"] for c in two.clients.values()]
    assert two.facts["config"]["seed"] == 3
    assert fedfuse.run(config, overrides=["seed=3"]).facts["artifact"] == two.facts["artifact"]


def test_the_method_may_be_given_apart_by_name_or_as_an_object(config: dict[str, Any]) -> None:
    method = EnsembleMethod(local=LocalSGD(num_epochs=1, batch_size=32), combine="vote")
    result = fedfuse.run(config, method=method)
    assert result.facts["config"]["method"]["combine"] == "vote"
    assert result.facts["config"]["method"]["local"]["num_epochs"] == 1
    same = fedfuse.run({**config, "method": result.facts["config"]["method"]})
    assert same.facts["artifact"] == result.facts["artifact"]
    config["data"]["limit"] = 40
    named = fedfuse.run(config, method="fedavg")
    assert named.facts["config"]["method"]["name"] == "fedavg"


def test_methods_are_reached_by_their_class_names() -> None:
    assert fedfuse.FuseFL is FuseFL
    for name in METHODS.names():
        kind = METHODS.get(name)
        assert getattr(fedfuse, kind.__name__) is kind
    for wrong in ("NoSuchMethod", "no_such_thing"):
        with pytest.raises(AttributeError, match=f"module 'fedfuse' has no attribute '{wrong}'"):
            getattr(fedfuse, wrong)


def test_the_public_names_are_all_there() -> None:
    assert all(getattr(fedfuse, name) is not None for name in fedfuse.__all__)
    assert isinstance(fedfuse.__version__, str)


def test_clients_of_different_models(config: dict[str, Any]) -> None:
    config["model"]["clients"] = {"client_1": {"width": 12}, "client_2": {"depth": 3}}
    result = fedfuse.run(config)
    channels = [[c["out_channels"] for c in level] for level in result.artifact.recipe["inner"]["levels"]]
    assert channels == [[0, 0, 0], [8, 12, 8]]


def test_a_model_for_a_client_that_there_is_not(config: dict[str, Any]) -> None:
    config["model"]["clients"] = {"client_7": {"width": 12}}
    with pytest.raises(ConfigError) as caught:
        fedfuse.run(config)
    assert str(caught.value).startswith(
        'there is no client "client_7"\n  where: model.clients.client_7\n  fix:   did you mean "client_'
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("section", ["server", "runtime"])
def test_a_device_that_there_is_not(config: dict[str, Any], section: str) -> None:
    config[section]["device"] = "cuda"
    with pytest.raises(ConfigError) as caught:
        fedfuse.run(config)
    assert str(caught.value) == (
        f"there is no CUDA device\n  where: {section}.device\n  fix:   use device: cpu or auto"
    )


def test_too_few_answers_stop_the_run_and_what_came_is_kept(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedfuse.methods import fusefl

    def fails(self: Any, stage: Any, frozen: Any, client: Any, num_epochs: int) -> Any:
        if client.id == "client_1":
            raise OSError("the disk is gone")
        return original(self, stage, frozen, client, num_epochs)

    original = fusefl.FuseFL._train
    monkeypatch.setattr(fusefl.FuseFL, "_train", fails)
    with pytest.raises(QuorumError) as caught:
        fedfuse.run(config, out=tmp_path)
    assert caught.value.what.startswith(
        '2 of 3 clients answered the exchange "block_0", 3 are needed (client_1: OSError: the disk is gone ('
    )
    assert not (tmp_path / "result.json").exists()
    result = fedfuse.run(config, overrides=["federation.quorum=0.6"], out=tmp_path)
    assert list(result.missing) == ["client_1"]
    assert result.accuracy is not None
    monkeypatch.undo()
    whole = fedfuse.run(config, out=tmp_path)
    assert whole.missing == {}
    entries = json.loads((tmp_path / "ledger.json").read_text())["entries"]
    assert [(e["client"], e["from_journal"]) for e in entries[:3]] == [
        ("client_0", True),
        ("client_1", False),
        ("client_2", True),
    ]


class Heard(Observer):
    def __init__(self) -> None:
        self.events: list[tuple[Any, ...]] = []

    def exchange(self, key: str, client_id: str, done: int, total: int, fraction: float) -> None:
        self.events.append(("exchange", key, client_id, done, total, fraction))

    def server(self, what: str, done: int, total: int) -> None:
        self.events.append(("server", what, done, total))

    def run_ended(self, result: Result) -> None:
        self.events.append(("ended", result.method))

    def note(self, text: str) -> None:
        self.events.append(("note", text))


def test_an_observer_hears_every_exchange_and_the_end(config: dict[str, Any]) -> None:
    heard = Heard()
    fedfuse.run(config, overrides=["method.head={kind: calibrated, num_draws: 5, num_epochs: 1}"], observer=heard)
    exchanges = [e for e in heard.events if e[0] == "exchange"]
    assert list(dict.fromkeys(e[1] for e in exchanges)) == ["block_0", "block_1", "moments"]
    for key in ("block_0", "block_1", "moments"):
        own = [e for e in exchanges if e[1] == key]
        assert own[0] == ("exchange", key, "", 0, 3, 0.0)
        assert max(e[3] for e in own) == 3
    assert ("server", "calibrating the head", 1, 1) in heard.events
    assert heard.events[-1] == ("ended", "fusefl")


def test_a_damaged_entry_of_the_journal_is_told_and_asked_for_again(config: dict[str, Any], tmp_path: Path) -> None:
    first = fedfuse.run(config, out=tmp_path)
    entry = min((tmp_path / "journal").glob("*.safetensors"))
    entry.write_bytes(entry.read_bytes()[:-1])
    heard = Heard()
    again = fedfuse.run(config, out=tmp_path, observer=heard)
    assert again.facts["artifact"] == first.facts["artifact"]
    notes = [e[1] for e in heard.events if e[0] == "note"]
    assert notes == [f"the journal's entry {entry.stem[:8]} was damaged and was asked for again"]
