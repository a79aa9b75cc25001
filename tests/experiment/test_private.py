"""The section ``privacy`` from the configuration to the report, on handwritten digits."""

from __future__ import annotations

import importlib
import json
import math
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

import fedfuse
from fedfuse.core.artifact import Artifact
from fedfuse.core.client import ClientSide, Request, perform
from fedfuse.core.errors import ConfigError, TaskError
from fedfuse.core.journal import Journal
from fedfuse.core.payload import Payload
from fedfuse.core.release import Privacy
from fedfuse.core.settings import to_json
from fedfuse.experiment import read_config, resolve
from fedfuse.experiment.agreement import Agreement, open_side
from fedfuse.experiment.result import Result
from fedfuse.experiment.setting import Loader
from fedfuse.methods.fedavg import FedAvg
from fedfuse.report import print_result, write_report

UNSAID = {"num_examples": 1, "label_counts": 1}
LOCAL = {"clip_norm": 1.0, "epsilon": 30.0, "constants": UNSAID}
CENTRAL = {**LOCAL, "mechanism": "central"}


@pytest.fixture
def fedavg(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "method": {"name": "fedavg", "local": {"num_epochs": 2, "batch_size": 32}}}


def run(config: Mapping[str, Any], out: Path | None = None, **sections: Any) -> Result:
    return fedfuse.run({**config, **sections}, out=out)


def uploads(folder: Path) -> list[Payload]:
    return [entry.payload() for entry in Journal(folder / "journal", locks=False).entries()]


def weights(payload: Mapping[str, Any]) -> dict[str, Tensor]:
    return {key: value for key, value in payload.items() if key.startswith("model/") and isinstance(value, Tensor)}


def test_local_noise_is_in_everything_that_leaves(fedavg: dict[str, Any], tmp_path: Path) -> None:
    plain = run(fedavg, tmp_path / "plain")
    private = run(fedavg, tmp_path / "private", privacy=LOCAL)

    true, noisy = uploads(tmp_path / "plain"), uploads(tmp_path / "private")
    for upload in noisy:
        assert not any(key.startswith("curve/") for key in upload)
        assert (upload["num_examples"], set(upload.tensor("label_counts").tolist())) == (1, {1})
        for other in true:
            assert not any((weights(upload)[key] == tensor).any() for key, tensor in weights(other).items())
    assert plain.facts["privacy"] is None
    assert private.facts["privacy"]["holds"]
    assert private.facts["privacy"]["epsilon"] == pytest.approx(30.0)
    assert private.artifact is not None
    assert private.artifact.info["privacy"] == private.facts["privacy"]
    # The noise has the deviation that was declared: the released move is mostly noise.
    first = Loader(read_config(fedavg)).setting(2).model.build().state_dict()
    std = Privacy(**LOCAL).multiplier
    moves = [weights(upload)[f"model/{name}"].double() - tensor for upload in noisy for name, tensor in first.items()]
    total, count = sum(float((move**2).sum()) for move in moves), sum(move.numel() for move in moves)
    assert total / count == pytest.approx(std**2, rel=6 * math.sqrt(2 / count) + len(noisy) / (count * std**2))


def test_the_same_run_has_the_same_digest(fedavg: dict[str, Any], tmp_path: Path) -> None:
    first, again = (run(fedavg, privacy=LOCAL) for _ in range(2))
    over_workers = run(fedavg, privacy=LOCAL, runtime={"name": "local", "workers": 2}, federation={"timeout_s": 60})

    assert first.facts["artifact"] == again.facts["artifact"] == over_workers.facts["artifact"]


@pytest.mark.parametrize("privacy", [LOCAL, CENTRAL])
def test_flower_carries_the_terms(fedavg: dict[str, Any], privacy: dict[str, Any]) -> None:
    pytest.importorskip("flwr")
    importlib.import_module("flower_double")  # registers the runtime
    here = run(fedavg, privacy=privacy)
    over_flower = run(fedavg, privacy=privacy, runtime={"name": "flower-double"})

    assert here.facts["artifact"] == over_flower.facts["artifact"]
    assert here.facts["privacy"] == over_flower.facts["privacy"]


def test_a_secret_changes_the_noise_and_is_kept(fedavg: dict[str, Any], tmp_path: Path) -> None:
    secret = {**LOCAL, "noise": "secret"}
    first = run(fedavg, tmp_path / "a", privacy=secret)
    other = run(fedavg, tmp_path / "b", privacy=secret)
    (tmp_path / "a" / "result.json").unlink()
    again = run(fedavg, tmp_path / "a", privacy=secret)

    assert stat.S_IMODE((tmp_path / "a" / "noise.key").stat().st_mode) == 0o600
    assert first.facts["artifact"] == again.facts["artifact"] != other.facts["artifact"]
    assert first.facts["privacy"]["noise"] == "secret"
    assert not any("Simulations only" in line for line in first.facts["privacy"]["lines"])
    # Without a folder the secret lasts as long as the run.
    assert run(fedavg, privacy=secret).facts["artifact"] != run(fedavg, privacy=secret).facts["artifact"]


def test_central_noise_is_in_the_model_and_not_in_the_uploads(fedavg: dict[str, Any], tmp_path: Path) -> None:
    private = run(fedavg, tmp_path / "run", privacy=CENTRAL)
    first = Loader(read_config(fedavg)).setting(2).model.build().state_dict()

    sent = uploads(tmp_path / "run")
    for upload in sent:
        moves = [weights(upload)[f"model/{name}"].double() - tensor for name, tensor in first.items()]
        assert math.sqrt(sum(float((move**2).sum()) for move in moves)) <= 1.0 + 1e-5
    n, sigma = len(sent), Privacy(**CENTRAL).multiplier
    assert private.artifact is not None
    fused = Artifact.read(tmp_path / "run" / "artifact").state
    assert {tensor.shape for tensor in fused.values()} >= {tensor.shape for tensor in first.values()}
    noise = []
    for name in first:
        mean = sum(weights(upload)[f"model/{name}"].double() for upload in sent) / n
        ours = next(value for key, value in private.artifact.state.items() if key.endswith(name))
        noise.append(((ours.double() - mean) * n / sigma).flatten())
    z = torch.cat(noise)
    assert abs(float((z**2).sum()) - z.numel()) < 5 * math.sqrt(2 * z.numel())


def test_other_noise_asks_no_client_again(fedavg: dict[str, Any], tmp_path: Path) -> None:
    run(fedavg, tmp_path / "run", privacy=CENTRAL)
    (tmp_path / "run" / "result.json").unlink()
    again = run(fedavg, tmp_path / "run", privacy={**CENTRAL, "epsilon": 300.0})

    ledger = json.loads((tmp_path / "run" / "ledger.json").read_text())
    assert again.facts["privacy"]["epsilon"] == pytest.approx(300.0)
    assert all(entry["from_journal"] for entry in ledger["entries"])


def test_central_takes_methods_that_need_only_sums(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        run(config, privacy=CENTRAL, method={"name": "ensemble"})

    assert caught.value.what == (
        '"ensemble" needs the uploads one by one, and central privacy leaves it their noisy mean alone'
    )
    assert caught.value.fix.startswith("use mechanism: local, or a method that needs only sums: afl, ")
    assert "fedavg" in caught.value.fix


def test_what_nobody_named_stops_the_run(fedavg: dict[str, Any]) -> None:
    with pytest.raises(TaskError, match='the private upload holds "label_counts": whole numbers, which get no noise'):
        run(fedavg, privacy={"clip_norm": 1.0, "epsilon": 3.0})


def test_every_round_is_a_release(fedavg: dict[str, Any]) -> None:
    rounds = {**fedavg["method"], "num_rounds": 2}
    with pytest.raises(ConfigError, match='the exchange "round_1" would be release 2 of each client'):
        run(fedavg, method=rounds, privacy=LOCAL)

    found = run(fedavg, method=rounds, privacy={**LOCAL, "num_releases": 2}).facts["privacy"]
    assert (found["num_releases"], found["epsilon"]) == (2, pytest.approx(30.0))


def test_training_by_dp_sgd(fedavg: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("opacus")
    method = {**fedavg["method"], "local": {"num_epochs": 2, "batch_size": 32, "privacy": {"noise_multiplier": 1.0}}}

    alone = run(fedavg, method=method).facts["privacy"]
    assert (alone["holds"], alone["uncovered"]) == (False, ["label_counts", "num_examples"])
    whole = run(fedavg, method=method, privacy={"mechanism": "trained", "constants": UNSAID}).facts["privacy"]
    assert whole["holds"]
    assert whole["epsilon"] == max(whole["epsilon_by_client"].values())
    assert set(whole["epsilon_by_client"]) == {"client_0", "client_1", "client_2"}


def test_trained_needs_private_training(fedavg: dict[str, Any]) -> None:
    with pytest.raises(ConfigError) as caught:
        run(fedavg, privacy={"mechanism": "trained"})
    assert str(caught.value) == (
        'nothing in "fedavg" trains privately\n'
        "  where: privacy.mechanism\n"
        "  fix:   set method.local.privacy, or use mechanism: local"
    )


def test_a_method_of_several_exchanges(config: dict[str, Any]) -> None:
    constants = {"num_examples": 1, "*num_batches_tracked": 0, "moments/counts": 1}
    privacy = {"clip_norm": 5.0, "noise_multiplier": 2.0, "constants": constants}
    found = run(config, privacy=privacy).facts["privacy"]

    assert found["exchanges"] == ["block_0", "block_1", "moments"]
    assert found["covers"] == ["adaptor/*", "block/*", "head/*", "moments/*"]
    assert found["epsilon"] == pytest.approx(fedfuse.core.gaussian.gaussian_epsilon(2.0, 1e-5, 3))


def test_it_is_printed_and_in_the_report(fedavg: dict[str, Any], tmp_path: Path) -> None:
    result = run(fedavg, tmp_path / "run", privacy=LOCAL)
    console = Console(width=200)
    with console.capture() as captured:
        print_result(result.facts, console)
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")

    for line in result.facts["privacy"]["lines"]:
        assert line in captured.get()
    assert "What was kept private" in page
    assert "Differential privacy (local): epsilon 30.00 at delta 1e-05, for model/*." in page


def test_the_section_is_written_into_the_configuration(fedavg: dict[str, Any]) -> None:
    assert "privacy" not in resolve(read_config(fedavg))
    resolved = resolve(read_config({**fedavg, "privacy": LOCAL}))

    assert resolved["privacy"] == to_json(Privacy(**LOCAL))
    with pytest.raises(ConfigError, match='unknown setting "clip"'):
        resolve(read_config({**fedavg, "privacy": {"clip": 1}}))


def real_side(config: Mapping[str, Any], home: Path) -> tuple[Agreement, ClientSide]:
    checked = read_config(config)
    setting = Loader(checked).setting(checked.seed)
    agreement = Agreement.decode(Agreement.of(checked, setting).encode())
    return agreement, open_side(agreement, "client_0", setting.data.clients["client_0"], home=home)


def request(release: Mapping[str, Any]) -> Request:
    method = FedAvg()
    return Request(
        "fedavg", to_json(method), "train_local", "models", "client_0", 1, "", "k", Payload().encode(), release
    )


def test_a_client_elsewhere_makes_its_noise_from_its_own_secret(fedavg: dict[str, Any], tmp_path: Path) -> None:
    fedavg = {**fedavg, "data": {**fedavg["data"], "limit": 60}, "privacy": LOCAL}
    (agreement, side), (_, other) = real_side(fedavg, tmp_path / "a"), real_side(fedavg, tmp_path / "b")
    asked = request(agreement.releases().terms())

    first, again, elsewhere = perform(asked, side), perform(asked, side), perform(asked, other)
    assert first.error == ""
    assert first.upload == again.upload != elsewhere.upload


def test_a_client_keeps_the_server_to_what_was_agreed(fedavg: dict[str, Any], tmp_path: Path) -> None:
    _, side = real_side({**fedavg, "privacy": LOCAL}, tmp_path / "a")

    for weaker in ({}, Privacy(**{**LOCAL, "epsilon": 1e6}).terms()):
        reply = perform(request(weaker), side)
        assert reply.upload is None
        assert reply.error == (
            "the server asks for an upload under other terms of privacy than were agreed on\n"
            "  where: client client_0\n"
            "  fix:   ask the server's operator which section privacy holds"
        )
