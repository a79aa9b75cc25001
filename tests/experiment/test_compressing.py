"""The section ``upload`` from the configuration to the report, on handwritten digits and on every runtime."""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import fedfuse
from fedfuse.commands.inspecting import describe
from fedfuse.commands.splitting import split
from fedfuse.core.client import Reply
from fedfuse.core.errors import ConfigError
from fedfuse.core.journal import Journal
from fedfuse.experiment import read_config, resolve
from fedfuse.experiment.contributing import contribute
from fedfuse.experiment.inbox import fuse_inbox
from fedfuse.experiment.result import Result
from fedfuse.runtimes.local import LocalRuntime

INT8 = {"codec": "int8"}
TOPK = {"codec": "topk", "fraction": 0.1}
TERNARY = {"codec": "ternary", "error_feedback": True}


@pytest.fixture
def rounds(config: dict[str, Any]) -> dict[str, Any]:
    local = {"num_epochs": 3, "batch_size": 32}
    return {**config, "method": {"name": "fedavg", "num_rounds": 3, "local": local}, "upload": TOPK}


def run(config: Mapping[str, Any], out: Path | None = None, **sections: Any) -> Result:
    return fedfuse.run({**config, **sections}, out=out)


def digest(result: Result) -> str:
    return str(result.facts["artifact"]["digest"])


def test_the_ledger_counts_what_crossed_and_the_method_gets_whole_models(
    rounds: dict[str, Any], tmp_path: Path
) -> None:
    plain = run(rounds, tmp_path / "plain", upload=None)
    coded = run(rounds, tmp_path / "coded")

    sizes = {path: path.stat().st_size for path in (tmp_path / "coded" / "journal").glob("*.safetensors")}
    assert coded.ledger["upload_bytes_total"] == sum(sizes.values()) < plain.ledger["upload_bytes_total"]
    assert coded.ledger["download_bytes"] == plain.ledger["download_bytes"]
    crossed = Journal(tmp_path / "coded" / "journal", locks=False).entries()[0].payload()
    assert any(key.startswith("coded/values/model/") for key in crossed)
    text = describe(tmp_path / "coded")
    assert "  codec       codec: topk, error_feedback: True, fraction: 0.1, min_entries: 64" in text
    assert "codec:" not in describe(tmp_path / "plain")

    assert coded.artifact is not None
    assert plain.artifact is not None
    assert set(coded.artifact.state) == set(plain.artifact.state)
    assert "Uploads were coded by topk (min_entries 64, fraction 0.1, error_feedback True)" in str(
        coded.facts["facts"]["notes"]
    )


def test_no_codec_asks_the_question_that_was_asked_before(rounds: dict[str, Any], tmp_path: Path) -> None:
    run(rounds, tmp_path / "run", upload=None)
    entries = {path.name for path in (tmp_path / "run" / "journal").glob("*.json")}
    again = run(rounds, tmp_path / "run", upload={"codec": "none"})

    assert entries == {path.name for path in (tmp_path / "run" / "journal").glob("*.json")}
    assert all(entry["from_journal"] for entry in json.loads((tmp_path / "run" / "ledger.json").read_text())["entries"])
    assert "upload" not in again.facts["config"]


@pytest.mark.parametrize("upload", [TOPK, TERNARY, {**INT8, "rounding": "stochastic"}], ids=lambda u: u["codec"])
def test_every_runtime_gives_the_same_bits_and_bytes(
    rounds: dict[str, Any], upload: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("flwr")
    importlib.import_module("flower_double")  # registers the runtime
    monkeypatch.setattr("fedfuse.runtimes.local._WORTH_IT_S", 0.0)
    wanted = run(rounds, tmp_path / "one", upload=upload)

    for number, runtime in enumerate(
        (
            {"name": "local", "workers": 2},
            {"name": "replay", "journal": str(tmp_path / "one")},
            {"name": "flower-double"},
        )
    ):
        other = run(rounds, tmp_path / f"other_{number}", upload=upload, runtime=runtime)
        assert digest(other) == digest(wanted), runtime
        assert other.ledger["upload_bytes_total"] == wanted.ledger["upload_bytes_total"]


def test_what_is_owed_survives_a_restart(
    rounds: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = run(rounds, tmp_path / "whole")
    original = LocalRuntime.exchange

    def dies(self: LocalRuntime, requests: Any, **others: Any) -> Any:
        for reply in original(self, requests, **others):
            if requests[0].exchange == "round_1" and reply.client_id == "client_1":
                raise KeyboardInterrupt
            yield reply

    with monkeypatch.context() as patch:
        patch.setattr(LocalRuntime, "exchange", dies)
        with pytest.raises(KeyboardInterrupt):
            run(rounds, tmp_path / "run")
    assert digest(run(rounds, tmp_path / "run")) == digest(wanted)
    # Without what is owed it would be another model.
    assert digest(run(rounds, tmp_path / "forgets", upload={**TOPK, "error_feedback": False})) != digest(wanted)


def test_a_client_that_missed_an_exchange_owes_what_it_owed_before(
    rounds: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, asked = LocalRuntime.exchange, {}

    def loses(self: LocalRuntime, requests: Any, **others: Any) -> Any:
        asked.update({(request.exchange, request.client_id): request for request in requests})
        for reply in original(self, requests, **others):
            is_lost = requests[0].exchange == "round_1" and reply.client_id == "client_1"
            yield Reply(reply.client_id, error="it was lost") if is_lost else reply

    monkeypatch.setattr(LocalRuntime, "exchange", loses)
    run(rounds, tmp_path / "run", federation={"quorum": 0.5})
    assert asked["round_0", "client_1"].unsent == ""
    assert asked["round_2", "client_0"].unsent == asked["round_1", "client_0"].answer_key
    assert asked["round_2", "client_1"].unsent == asked["round_0", "client_1"].answer_key


def test_by_hand_it_is_the_simulation(rounds: dict[str, Any], tmp_path: Path) -> None:
    simulation = read_config({**rounds, "runtime": {"name": "local"}})
    split(simulation, tmp_path / "split")
    federation = read_config(tmp_path / "split" / "federation.yaml")
    assert federation.upload is not None
    assert federation.upload["codec"] == "topk"
    names, request = sorted(federation.federation.clients), None
    for exchange in range(4):
        for name in names:
            contribute(
                federation if request is None else None,
                name,
                tmp_path / "split" / f"{name}.npz",
                out=str(tmp_path / "inbox" / f"{exchange}_{name}.fed"),
                home=tmp_path / "homes" / name,
                request=request,
            )
        found = fuse_inbox([str(tmp_path / "inbox")], federation, tmp_path / "run")
        request = str(found.request)
        if found.result is not None:
            break
    assert found.result is not None
    assert digest(found.result) == digest(run(rounds, tmp_path / "simulation"))
    text = describe(tmp_path / "inbox" / f"0_{names[0]}.fed")
    assert "(in a code: weights and buffers of the locally trained model)" in text


@pytest.mark.parametrize("settings", [{"name": "ensemble"}, {"name": "fusefl", "num_blocks": 2}, {"name": "local"}])
def test_every_method_takes_a_codec(config: dict[str, Any], settings: dict[str, Any]) -> None:
    method = {**settings, "local": {"num_epochs": 4, "batch_size": 32}}
    plain = run(config, method=method)
    coded = run(config, method=method, upload={**INT8, "keys": ["model/*", "block/*"]})

    assert plain.accuracy is not None
    assert coded.accuracy == pytest.approx(plain.accuracy, abs=0.1)
    assert coded.ledger["upload_bytes_total"] < plain.ledger["upload_bytes_total"]


def test_noise_comes_before_the_code(rounds: dict[str, Any]) -> None:
    privacy = {"clip_norm": 1.0, "noise_multiplier": 1.0, "constants": {"num_examples": 1, "label_counts": 1}}
    once = {**rounds, "method": {**rounds["method"], "num_rounds": 1}}
    noisy = run(once, privacy=privacy, upload=None)
    coded = run(once, privacy=privacy, upload=INT8)

    assert coded.facts["privacy"] == noisy.facts["privacy"]
    assert coded.artifact is not None
    assert noisy.artifact is not None
    for name, tensor in noisy.artifact.state.items():
        # The same noise, but for the rounding: of three clients' standard normal numbers none is beyond 6.
        error = (coded.artifact.state[name] - tensor).abs().max().item()
        assert error <= 0.5 * 6 / 127, name


def test_what_a_codec_would_break_is_refused(rounds: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        run(rounds, federation={"secure_aggregation": {}})
    assert str(caught.value) == (
        'codes of "topk" cannot be added up unseen\n  where: upload.codec\n'
        "  fix:   leave the section upload out, or federation.secure_aggregation"
    )
    constants = {"num_examples": 1, "label_counts": 1}
    with pytest.raises(ConfigError, match="the noise of the mean is made for uploads as they were clipped"):
        run(rounds, privacy={"mechanism": "central", "clip_norm": 1.0, "noise_multiplier": 1.0, "constants": constants})


def test_hostile_clients_code_what_they_forge(rounds: dict[str, Any], tmp_path: Path) -> None:
    result = run(rounds, tmp_path / "run", attack={"name": "sign_flip", "clients": 1})

    entries = Journal(tmp_path / "run" / "journal", locks=False).entries()
    sizes = [entry.facts["upload_bytes"] for entry in entries]
    assert max(sizes) < 1.1 * min(sizes)
    assert result.facts["attack"] is not None


def test_the_resolved_section_has_its_defaults(rounds: dict[str, Any]) -> None:
    assert resolve(read_config({**rounds, "upload": INT8}))["upload"] == {
        "codec": "int8",
        "keys": [],
        "min_entries": 64,
        "scale_per": "row",
        "rounding": "nearest",
    }
    assert "upload" not in resolve(read_config({**rounds, "upload": None}))


def test_a_model_of_ones_own_takes_a_codec() -> None:
    draw = torch.Generator().manual_seed(0)
    clients = [(torch.rand(40, 20, generator=draw), torch.arange(40) % 2) for _ in range(2)]
    module = torch.nn.Sequential(torch.nn.Linear(20, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    result = fedfuse.run(model=module, clients=clients, method="fedavg", upload={"codec": "topk", "fraction": 0.05})

    assert result.facts["config"]["upload"]["fraction"] == 0.05
    assert result.artifact is not None
    # One exchange: 8 of the 160 entries of the first layer have moved, on each client's side.
    change = result.artifact.state["0.weight"] - module.state_dict()["0.weight"]
    assert 8 <= int(change.count_nonzero()) <= 16
