"""One fusion rule over the clients' models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import fedfuse
from fedfuse.core.errors import ConfigError, FedfuseError
from fedfuse.methods.fedavg import FedAvg
from fedfuse.methods.merge import Merge
from fedfuse.rules import fuse_uploads
from fedfuse.rules.mean import Mean
from fedfuse.rules.ties import Ties
from fedfuse.training import LocalSGD, evaluate

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)


def test_the_rule_sees_uploads_weights_and_first_weights(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fused = fed.fuse(Merge(local=SETTINGS, rule_settings={"keep_fraction": 0.5})).model.state
    uploads = [fed.upload("local_models", f"client_{i}") for i in range(3)]
    first = fed.spec.build().state_dict()
    statistics = {name for name in first if "running" in name}
    assert statistics
    wanted = fuse_uploads(uploads, Ties(keep_fraction=0.5), [24, 32, 40], base=first, buffers=statistics)
    mean = fuse_uploads(uploads, Mean(), [24, 32, 40])
    assert list(fused) == list(wanted)
    for name, tensor in wanted.items():
        assert fused[name].equal(tensor)
        assert fused[name].equal(mean[name]) == (name in statistics or "num_batches" in name)


@pytest.mark.parametrize("rule", ["mean", "task_arithmetic"])
def test_mean_and_task_arithmetic_of_weight_one_are_fedavg(federation: Any, rule: str) -> None:
    fed = federation(width=4, depth=2)
    wanted = fed.fuse(FedAvg(local=SETTINGS)).model.state
    found = fed.fuse(Merge(local=SETTINGS, rule=rule)).model.state
    assert all(entry.from_journal for entry in fed.cohort.ledger.entries)
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


def test_clients_may_count_equally(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1)
    fused = fed.fuse(Merge(local=SETTINGS, rule="mean", weighting="equal")).model.state
    stack = torch.stack([fed.upload("local_models", f"client_{i}").tensor("model/1.weight") for i in range(3)])
    torch.testing.assert_close(fused["1.weight"], stack.mean(0))


@pytest.mark.parametrize("rule", ["dare", "karcher", "median", "slerp", "ties", "trimmed_mean"])
def test_every_rule_gives_a_model_that_has_learned(federation: Any, rule: str) -> None:
    fed = federation("mlp", width=16, depth=1)
    local = LocalSGD(num_epochs=8, batch_size=16)
    module = fed.fuse(Merge(local=local, rule=rule)).model.module()
    assert evaluate(module, fed.test).accuracy > 0.5


def test_a_rule_or_setting_that_is_unknown_is_told_before_clients_work() -> None:
    with pytest.raises(FedfuseError) as caught:
        Merge(rule="tie")
    assert str(caught.value).startswith('there is no rule "tie"\n  fix:   did you mean "ties"?')
    with pytest.raises(ConfigError) as caught:
        Merge(rule_settings={"keep_fracton": 0.1})
    assert str(caught.value).startswith(
        'unknown setting "keep_fracton"\n  where: method.rule_settings.keep_fracton\n'
        '  fix:   did you mean "keep_fraction"?'
    )


def test_different_models_are_refused(federation: Any) -> None:
    fed = federation(width=4, depth=2, client_models={"client_1": ("mlp", {"width": 4})})
    with pytest.raises(ConfigError, match="weights of different architectures cannot be averaged"):
        fed.fuse(Merge(local=SETTINGS))


def test_on_digits_and_in_a_comparison() -> None:
    config = {
        "data": {"source": "digits", "partition": {"scheme": "iid", "num_clients": 3}},
        "model": {"family": "mlp", "width": 32, "depth": 1},
        "method": {"name": "merge", "local": {"num_epochs": 5}},
        "runtime": {"name": "local", "workers": 1},
        "server": {"threads": 1},
    }
    board = fedfuse.compare(config, methods=["merge[rule=slerp]", "merge[rule=dare,rule_settings.drop_fraction=0.1]"])
    assert min(row["accuracy_mean"] for row in board["rows"]) > 0.6
