"""Own models and a small common adapter, trained in turn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedfuse.core.artifact import detached_state, load_state
from fedfuse.core.errors import ConfigError
from fedfuse.methods.pfedlora import PFedLoRA, beside
from fedfuse.training import LocalSGD, predict, train

SETTINGS = LocalSGD(num_epochs=3, batch_size=16)
OWN = {"client_1": ("mlp", {"width": 5, "depth": 2})}


def test_only_the_adapter_travels_while_training(federation: Any) -> None:
    fed = federation(client_models=OWN, width=4, depth=2)
    fused = fed.fuse(PFedLoRA(local=SETTINGS, width=6, rank=2))
    assert fed.cohort.ledger.exchanges() == ["round_0", "finish"]
    for client_id in fused.personal:
        upload = fed.upload("round_0", client_id)
        # 60 in the convolution, 96 x 2, 2 x 4 + 4.
        assert sum(t.numel() for t in upload.group("adapter").values()) == 264
        assert not upload.group("own")
        names = fed.job.model_of(client_id).build().state_dict()
        assert list(fed.upload("finish", client_id)) == ["num_examples", *sorted(f"own/{name}" for name in names)]


def test_the_own_model_learns_beside_the_adapter_and_then_the_adapter_beside_it(federation: Any) -> None:
    fed = federation("mlp", width=5, depth=2)
    method = PFedLoRA(local=SETTINGS, adapter_weight=0.4)
    fused = fed.fuse(method)
    own, adapter = fed.spec.build(), method.adapter(fed.job).build()
    rng, data, cpu = fed.rng("client_0", "round_0"), fed.data["client_0"].train, torch.device("cpu")
    # Three epochs: two for the own model, one for the adapter.
    train(own, data, SETTINGS, rng=rng.child("own"), device=cpu, num_epochs=2, loss=beside(adapter, 0.6))
    train(adapter, data, SETTINGS, rng=rng.child("adapter"), device=cpu, num_epochs=1, loss=beside(own, 0.4))
    upload = fed.upload("round_0", "client_0").group("adapter")
    assert all(torch.equal(upload[name], tensor) for name, tensor in detached_state(adapter).items())
    kept = fed.upload("finish", "client_0").group("own")
    assert all(torch.equal(kept[name], tensor) for name, tensor in detached_state(own).items())
    # The result answers with the own model and the mean adapter.
    mean = method.adapter(fed.job).build()
    parts = [fed.upload("round_0", f"client_{k}").group("adapter") for k in range(3)]
    counts = zip((24, 32, 40), parts, strict=True)
    sums = [{name: n * t.double() / 96 for name, t in part.items()} for n, part in counts]
    load_state(mean, {name: (sums[0][name] + sums[1][name] + sums[2][name]).float() for name in sums[0]})
    x = fed.test.x
    wanted = 0.6 * predict(own, x) + 0.4 * predict(mean, x)
    assert torch.allclose(predict(fused.personal["client_0"].module(), x), wanted, atol=1e-5)


def test_the_loss_beside_a_frozen_model_by_hand() -> None:
    one, other = nn.Linear(1, 2), nn.Linear(1, 2)
    for layer, weight in ((one, [[1.0], [0.0]]), (other, [[0.0], [3.0]])):
        layer.load_state_dict({"weight": torch.tensor(weight), "bias": torch.zeros(2)})
    x, y = torch.tensor([[1.0]]), torch.tensor([0])
    loss = beside(other, 0.75)(one, x, y)
    assert loss.item() == pytest.approx(F.cross_entropy(torch.tensor([[0.75, 0.75]]), y).item())
    loss.backward()
    assert other.weight.grad is None
    assert one.weight.grad is not None


def test_a_second_round_goes_on_with_the_kept_model_and_the_mean_adapter(federation: Any) -> None:
    fed = federation(client_models=OWN, width=4, depth=2)
    fed.fuse(PFedLoRA(local=LocalSGD(num_epochs=4, batch_size=16), num_rounds=2))
    sent = fed.message("round_1", "client_0").group("adapter")
    parts = [fed.upload("round_0", f"client_{k}").group("adapter") for k in range(3)]
    for name, tensor in sent.items():
        mean = sum(n * p[name].double() for n, p in zip((24, 32, 40), parts, strict=True)) / 96
        assert torch.allclose(tensor, torch.as_tensor(mean).float(), atol=1e-6)
    states = fed.kept("client_0")
    assert [sorted({key.split("/")[0] for key in state}) for state in states] == [["own"], ["own"], ["adapter", "own"]]
    assert not torch.equal(states[0]["own/0.weight"], states[1]["own/0.weight"])


def test_without_collect_nothing_of_the_own_model_leaves(federation: Any) -> None:
    fed = federation(client_models=OWN, width=4, depth=2)
    fused = fed.fuse(PFedLoRA(local=SETTINGS, collect=False))
    assert fused.model is None
    assert not fused.personal
    assert list(fed.upload("finish", "client_0")) == ["num_examples"]
    assert fed.job.facts["notes"] == ["clients keep their models: the server has none to score"]


def test_what_cannot_be_is_refused(federation: Any) -> None:
    for settings, message in (
        ({"num_rounds": 0}, "num_rounds is 0"),
        ({"adapter_weight": 1.0}, "adapter_weight is 1.0"),
        ({"local": LocalSGD(num_epochs=3), "num_rounds": 2}, "3 local epochs cannot be divided over model and adapter"),
        ({"local": LocalSGD(patience=2)}, "neither is judged alone"),
    ):
        with pytest.raises(ConfigError, match=message):
            PFedLoRA(**settings)
