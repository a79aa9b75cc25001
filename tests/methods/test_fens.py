"""FENS: what crosses, the aggregator's rounds by hand, and clients without proxy data."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import fedfuse
from fedfuse.core.artifact import Artifact, load_state
from fedfuse.core.errors import ConfigError, DataError, QuorumError
from fedfuse.core.examples import Examples
from fedfuse.methods.ensemble import EnsembleMethod
from fedfuse.methods.fens import FENS
from fedfuse.models.combined import Aggregator, Combined
from fedfuse.training import LocalSGD, predict

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)


def take_proxies_from(fed: Any, *client_ids: str) -> None:
    sides = fed.runtime.inner._sides
    for client_id in client_ids:
        data = sides[client_id].data
        bare = dataclasses.replace(data, validation=Examples(data.validation.x[:0], data.validation.y[:0]))
        sides[client_id] = dataclasses.replace(sides[client_id], data=bare)


def members(fed: Any) -> list[torch.nn.Module]:
    found = []
    for client_id in fed.cohort.client_ids:
        module = fed.job.model_of(client_id).build()
        load_state(module, fed.upload("local_models", client_id).group("model"))
        found.append(module.eval())
    return found


def test_what_crosses(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fed.fuse(EnsembleMethod(local=SETTINGS))
    fed.fuse(FENS(local=SETTINGS, num_rounds=2))
    assert fed.cohort.ledger.exchanges() == ["local_models", "proxy_logits", "aggregator_0", "aggregator_1"]
    # The models are those of the ensemble, from the journal.
    assert [e.exchange for e in fed.cohort.ledger.entries if e.from_journal] == ["local_models"] * 3
    for k, client_id in enumerate(fed.cohort.client_ids):
        assert dict(fed.upload("proxy_logits", client_id)) == {"num_proxy": 8}
        sent = fed.message("proxy_logits", "client_0").group(f"members/{k}")
        for name, tensor in fed.upload("local_models", client_id).group("model").items():
            assert torch.equal(sent[name], tensor)
        light = fed.upload("aggregator_1", client_id)
        # 3 models of 4 classes, 4 hidden units each: (12 + 1) 12 + (12 + 1) 4 numbers.
        assert light.num_bytes == 4 * ((12 + 1) * 12 + (12 + 1) * 4)
        assert {key.split("/")[0] for key in light} == {"aggregator"}


def test_a_light_round_is_fedadam_on_the_pooled_proxy_data(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fed.fuse(FENS(local=SETTINGS, num_rounds=2, client_learning_rate=0.5, server_learning_rate=0.1))
    start = fed.message("aggregator_0", "client_0").group("aggregator")
    proxies = [data.validation for data in fed.data.values()]
    with torch.no_grad():
        logits = torch.cat([torch.stack([m(p.x) for m in members(fed)], 1) for p in proxies])
    net = Aggregator(3, 4, 4)
    load_state(net, start)
    loss = F.cross_entropy(net(logits), torch.cat([p.y for p in proxies]))
    found = fed.message("aggregator_1", "client_2").group("aggregator")
    for (name, _), gradient in zip(
        net.named_parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True
    ):
        # One step each over its whole part, weighted by sizes, is one step on the pool.
        change = (-0.5 * gradient).double()
        wanted = start[name].double() + 0.1 * 0.1 * change / ((0.01 * change.square()).sqrt() + 0.001)
        torch.testing.assert_close(found[name].double(), wanted, rtol=1e-3, atol=1e-5)


def test_the_artifact_is_the_members_under_the_last_aggregator(federation: Any, tmp_path: Path) -> None:
    fed = federation(width=4, depth=2)
    fused = fed.fuse(FENS(local=SETTINGS, num_rounds=3))
    net = Artifact.read(fused.model.save(tmp_path)).module()
    assert isinstance(net, Combined)
    with torch.no_grad():
        logits = torch.stack([m(fed.test.x) for m in members(fed)], 1)
        wanted = net.combiner(logits)
    torch.testing.assert_close(predict(net, fed.test.x), wanted, rtol=1e-4, atol=1e-4)
    sent = fed.message("aggregator_2", "client_0").group("aggregator")
    assert not torch.equal(fused.model.state["combiner.out.weight"], sent["out.weight"])


def test_int8_takes_a_third_of_the_download_and_is_what_is_served(federation: Any) -> None:
    fed = federation("mlp", width=64, depth=2)
    fed.fuse(FENS(local=SETTINGS, num_rounds=1))
    whole = {e.client: e.download_bytes for e in fed.cohort.ledger.entries if e.exchange == "proxy_logits"}
    fused = fed.fuse(FENS(local=SETTINGS, num_rounds=1, quantize=True))
    small = {e.client: e.download_bytes for e in fed.cohort.ledger.entries if e.exchange == "proxy_logits"}
    assert all(small[c] < whole[c] / 3 for c in whole)
    message = fed.message("proxy_logits", "client_1")
    names = [name for name, t in message.group("members/1").items() if t.dtype == torch.int8]
    assert names == sorted(name for name, p in fed.spec.build().named_parameters() if p.ndim == 2)
    for name in names:
        codes, scales = message.tensor(f"members/1/{name}"), message.tensor(f"scales/1/{name}")
        torch.testing.assert_close(fused.model.state[f"members.1.{name}"], codes.float() * scales[:, None])


def test_clients_of_different_models(federation: Any) -> None:
    others = {"client_1": ("mlp", {"width": 8}), "client_2": ("cnn", {"width": 6, "depth": 2})}
    fed = federation(width=4, depth=2, client_models=others)
    fused = fed.fuse(FENS(local=SETTINGS, num_rounds=2))
    assert predict(fused.model.module(), fed.test.x).shape == (60, 4)


def test_a_client_without_proxy_data_trains_and_has_no_say(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    take_proxies_from(fed, "client_1")
    fused = fed.fuse(FENS(local=SETTINGS, num_rounds=2))
    asked = sorted(e.client for e in fed.cohort.ledger.entries if e.exchange == "aggregator_1")
    assert asked == ["client_0", "client_2"]
    assert len(fused.model.module().members) == 3
    assert fed.job.facts["notes"] == [
        "Without validation data, and without a say in how the models are combined: client_1."
    ]


def test_no_proxy_data_at_all_is_an_error(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    take_proxies_from(fed, "client_0", "client_1", "client_2")
    with pytest.raises(DataError) as caught:
        fed.fuse(FENS(local=SETTINGS, num_rounds=2))
    assert str(caught.value) == (
        "no client has validation data to learn on how to combine the models\n"
        "  where: data.validation_fraction\n"
        "  fix:   set it above 0, or use the method ensemble"
    )


def test_a_client_that_leaves_costs_only_its_part(federation: Any) -> None:
    fed = federation(width=4, depth=2, absent={("aggregator_1", "client_0")}, quorum=0.6)
    assert fed.fuse(FENS(local=SETTINGS, num_rounds=3)).model is not None
    strict = federation(width=4, depth=2, absent={("aggregator_1", "client_0")})
    with pytest.raises(QuorumError, match="2 of 3 clients answered"):
        strict.fuse(FENS(local=SETTINGS, num_rounds=3))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"width": 0}, "width is 0\n  where: method.width\n  fix:   give at least 1"),
        ({"num_rounds": 0}, "num_rounds is 0\n  where: method.num_rounds\n  fix:   give at least 1"),
        (
            {"client_learning_rate": 0.0},
            "client_learning_rate is 0.0\n  where: method.client_learning_rate\n  fix:   give a number above 0",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FENS(**settings)
    assert str(caught.value) == message


def test_it_learns_digits() -> None:
    config: dict[str, Any] = {
        "data": {"source": "digits", "limit": 400, "test_limit": 200, "partition": {"scheme": "iid", "num_clients": 3}},
        "model": {"family": "mlp", "width": 32, "depth": 1},
        "runtime": {"name": "local", "workers": 1},
    }
    local = {"num_epochs": 5, "batch_size": 16, "learning_rate": 0.05}
    result = fedfuse.run(
        {**config, "method": {"name": "fens", "num_rounds": 30, "server_learning_rate": 0.03, "local": local}}
    )
    assert result.accuracy is not None
    assert result.accuracy > 0.7
