"""Every registered method keeps the laws of the contract on every runtime."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conformance_federation import (
    SPECIAL_MODELS,
    Died,
    config_of,
    inputs_of,
    odd_clients,
    own_model,
    section,
)
from safetensors.torch import save_file

import fedfuse
from fedfuse.core.artifact import Artifact
from fedfuse.core.journal import Journal
from fedfuse.core.registry import METHODS
from fedfuse.experiment import Result, read_config, resolve
from fedfuse.experiment.configuration import named
from fedfuse.training import predict

NAMES = METHODS.names()

NOT_THE_CLIENTS_MODEL = {
    "adi": "a student learns on made inputs",
    "coboosting": "a student learns on made inputs",
    "dafl": "a student learns on made inputs",
    "dense": "a student learns on made inputs",
    "heterotune": "adapters in the model are trained with it",
    "intactofl": "a gate weighs the one model's logits",
    "fedcvae": "a classifier learns what the client's decoder draws",
    "feddf": "the student's BatchNorm layers see other inputs than the client's",
    "fedsd2c": "a student learns from a few images of the client's",
    "afl": "clients train nothing",
    "cellm": "only the largest entries of a change cross",
    "fedkseed": "clients train without gradients",
    "ferret": "a change crosses as a few coordinates",
    "ccvr": "the head is trained on features drawn from moments",
    "centralized": "the server trains, in an order of examples of its own",
    "fedpft": "clients train nothing",
    "lda": "clients train nothing",
    "pfedlora": "a small adapter answers with the model",
    "prototypes": "clients train nothing",
    "fed_sb": "clients train a square core, from another start",
    "fedex_lora": "two rounds of training are not one",
    "ffa_lora": "half of the adapter is frozen",
    "flexlora": "two rounds of training are not one",
    "flora": "two rounds of training are not one",
    "fedprox": "two rounds of training are not one",
    "fedavg": "two rounds of training are not one",
    "feature_ensemble": "the head is made from moments, not by the client",
    "fusefl": "blocks are trained in turn, and the head is made from moments",
    "fafi": "a client trains on another loss, and its prototypes are its head",
    "fedadam": "the server's step is not the mean",
    "feddyn": "two rounds of training are not one",
    "fednova": "two rounds of training are not one",
    "fens": "a network on top of the model has the last word",
    "linear_weights": "the one model's logits are weighted",
    "merge": "ties keeps the largest fifth of a client's changes",
    "scaffold": "two rounds of training are not one",
    "voting": "what a prediction is worth follows from a confusion matrix",
}
"""Methods whose result for one client is not that client's own model, and why."""

NO_TRAINED_BATCHNORM = {
    "afl": "a head on random features",
    "fedpft": "a head on random features",
    "lda": "a head on random features",
    "prototypes": "a head on random features",
}
"""Methods whose result has no BatchNorm layer that saw a batch, and why."""


def run(name: str, folder: Path | None = None, **sections: Any) -> Result:
    return fedfuse.run({**config_of(name), **sections}, out=folder)


def digest(result: Result) -> str:
    return str(result.facts["artifact"]["digest"])


def bytes_of(result: Result) -> dict[str, float]:
    return {key: value for key, value in result.ledger.items() if "bytes" in key and "rss" not in key}


class Undisturbed(dict[str, Result]):
    """Every method's run without faults, made when it is first asked for."""

    def __init__(self, home: Path) -> None:
        self.home = home

    def __missing__(self, name: str) -> Result:
        self[name] = run(name, self.home / name)
        return self[name]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    return Undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.mark.parametrize("name", NAMES)
def test_two_workers_give_the_same_bits_and_the_same_ledger(
    name: str, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = undisturbed[name]
    monkeypatch.setattr("fedfuse.runtimes.local._WORTH_IT_S", 0.0)
    other = run(name, tmp_path / "run", runtime={"name": "local", "workers": 2})
    assert digest(other) == digest(wanted)
    assert bytes_of(other) == bytes_of(wanted)


@pytest.mark.parametrize("name", NAMES)
def test_flower_gives_the_same_bits_and_the_same_ledger(name: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    pytest.importorskip("flwr")
    importlib.import_module("flower_double")  # registers the runtime
    wanted = undisturbed[name]
    other = run(name, tmp_path / "run", runtime={"name": "flower-double"})
    assert digest(other) == digest(wanted)
    wire = {key: value for key, value in bytes_of(other).items() if "wire" in key}
    assert {**bytes_of(other), **dict.fromkeys(wire, 0)} == bytes_of(wanted)
    # What seals and carries a message is small, but it is counted.
    assert wire["upload_wire_bytes_total"] > other.ledger["upload_bytes_total"]
    assert wire["download_wire_bytes_total"] > other.ledger["download_bytes_total"]


@pytest.mark.parametrize("name", NAMES)
def test_replay_gives_the_same_bits_and_the_same_ledger(name: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    source = undisturbed[name].folder
    assert source is not None
    folder = tmp_path / "run"
    other = run(name, folder, runtime={"name": "replay", "journal": str(source)})
    assert digest(other) == digest(undisturbed[name])
    assert bytes_of(other) == bytes_of(undisturbed[name])


@pytest.mark.parametrize("name", NAMES)
def test_the_order_of_clients_changes_nothing(
    name: str, undisturbed: Undisturbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedfuse.runtimes import local

    wanted = undisturbed[name]
    original = local.LocalRuntime.exchange

    def backwards(self: Any, requests: Any, **others: Any) -> Any:
        return iter(list(original(self, requests, **others))[::-1])

    monkeypatch.setattr(local.LocalRuntime, "exchange", backwards)
    monkeypatch.setattr(
        local.LocalRuntime,
        "clients",
        lambda self, known=local.LocalRuntime.clients: dict(reversed(known(self).items())),
    )
    assert digest(run(name, tmp_path / "run")) == digest(wanted)


@pytest.mark.parametrize("name", NAMES)
def test_a_crash_costs_only_what_was_not_answered(name: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    with pytest.raises(Died):
        run(name, tmp_path / "run", runtime={"name": "faulty", "dies_after": 2})
    again = run(name, tmp_path / "run")
    assert digest(again) == digest(undisturbed[name])
    entries = json.loads((tmp_path / "run" / "ledger.json").read_text())["entries"]
    assert sum(entry["from_journal"] for entry in entries) == 2


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_client_costs_only_that_client(name: str, tmp_path: Path) -> None:
    faulty = {"name": "faulty", "absent": "client_1"}
    result = run(name, tmp_path / "run", runtime=faulty, federation={"quorum": 0.6})
    assert list(result.missing) == ["client_1"]
    assert "the client has left" in result.missing["client_1"]
    assert result.accuracy is not None
    with pytest.raises(fedfuse.FedfuseError, match="2 of 3 clients answered"):
        run(name, tmp_path / "strict", runtime=faulty)


@pytest.mark.parametrize("name", NAMES)
def test_one_client_gives_that_clients_model(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    data = {**config["data"], "limit": 120, "partition": {"scheme": "iid", "num_clients": 1}}
    alone = run("local", tmp_path / "local", data=data, model=config["model"])
    result = run(name, tmp_path / "run", data=data)
    x = inputs_of(name, 8)
    own = predict(alone.personal["client_0"].module(), x)
    found = predict((result.artifact or result.personal["client_0"]).module(), x)
    is_same = bool(torch.allclose(own, found, atol=1e-5))
    assert is_same or name in NOT_THE_CLIENTS_MODEL
    assert found.shape == own.shape


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("name", NAMES)
def test_clients_with_one_example_or_one_class_and_models_without_batchnorm(name: str, norm: str) -> None:
    if norm == "none" and name in SPECIAL_MODELS:
        pytest.skip("its model has no BatchNorm anyway")
    clients = odd_clients(name)
    method = named(METHODS, name, {k: v for k, v in section(name).items() if k != "name"}, "method")
    result = fedfuse.run(
        model=own_model(name, norm), clients=clients, class_names="abcd", test=clients[2], method=method
    )
    assert result.accuracy is not None
    for artifact in [result.artifact] if result.artifact else result.personal.values():
        assert predict(artifact.module(), clients[2][0]).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_batchnorm_buffers_and_their_dtypes_are_part_of_the_model(name: str, undisturbed: Undisturbed) -> None:
    result = undisturbed[name]
    artifacts = [result.artifact] if result.artifact else list(result.personal.values())
    for artifact in artifacts:
        counters = {key: t for key, t in artifact.state.items() if key.endswith("num_batches_tracked")}
        assert bool(counters) != (name in NO_TRAINED_BATCHNORM or name in SPECIAL_MODELS)
        assert all(t.dtype == torch.int64 and t.ndim == 0 and t > 0 for t in counters.values())


@pytest.mark.parametrize("name", NAMES)
def test_every_upload_is_declared_and_every_task_says_what_it_is(name: str, undisturbed: Undisturbed) -> None:
    from fedfuse.core.payload import matches

    tasks = METHODS.get(name).tasks()
    declared = {pattern: words for task in tasks.values() for pattern, words in task.uploads.items()}
    assert all(declared.values()), f"say in a few words what each upload of {name} is"
    folder = undisturbed[name].folder
    assert folder is not None
    with Journal(folder / "journal") as journal:
        for entry in journal.entries():
            assert all(matches(key, declared) for key in entry.open())


def test_every_artifact_loads_in_a_fresh_process(undisturbed: Undisturbed, tmp_path: Path) -> None:
    folders, wanted = [], []
    kinds = {name in SPECIAL_MODELS: inputs_of(name, 5) for name in NAMES}
    inputs = tmp_path / "inputs.safetensors"
    save_file({"plain": kinds[False], "special": kinds[True]}, inputs)
    for name in NAMES:
        result = undisturbed[name]
        assert result.folder is not None
        path = result.folder / "artifact" / ("" if result.artifact else "client_0")
        folders.append(f"{'special' if name in SPECIAL_MODELS else 'plain'}:{path}")
        # As the other process asks it: predict would choose another memory format, whose sums round otherwise.
        with torch.inference_mode():
            wanted.append(Artifact.read(path).module()(kinds[name in SPECIAL_MODELS]).tolist())
    code = (
        "import json, sys, torch, fedfuse\n"
        "from safetensors.torch import load_file\n"
        "x = load_file(sys.argv[1])\n"
        "pairs = [word.split(':', 1) for word in sys.argv[2:]]\n"
        "with torch.inference_mode():\n"
        "    print(json.dumps([fedfuse.load(path)(x[kind]).tolist() for kind, path in pairs]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(inputs), *folders],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=True,
    )
    found = json.loads(done.stdout)
    for name, ours, theirs in zip(NAMES, wanted, found, strict=True):
        assert torch.allclose(torch.tensor(ours), torch.tensor(theirs), atol=1e-5), name


@pytest.mark.parametrize("name", NAMES)
def test_the_written_configuration_repeats_the_run(name: str, undisturbed: Undisturbed, tmp_path: Path) -> None:
    folder = undisturbed[name].folder
    assert folder is not None
    again = fedfuse.run(folder / "config.yaml", out=tmp_path / "again")
    assert digest(again) == digest(undisturbed[name])
    assert resolve(read_config(folder / "config.yaml")) == again.facts["config"]
