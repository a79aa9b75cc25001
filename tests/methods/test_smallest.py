"""The smallest model for everybody, averaged."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedfuse.core.artifact import detached_state
from fedfuse.core.errors import ConfigError
from fedfuse.methods.fedavg import FedAvg
from fedfuse.methods.sizes import all_models, described, num_values
from fedfuse.methods.smallest import Smallest
from fedfuse.models import spec
from fedfuse.models.graph import user_spec
from fedfuse.training import LocalSGD, train

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)
THREE = {"client_0": ("mlp", {"width": 12, "depth": 2}), "client_1": ("mlp", {"width": 3, "depth": 2})}


def test_models_are_ordered_by_the_numbers_that_they_hold(federation: Any) -> None:
    fed = federation("mlp", client_models=THREE, width=6, depth=2)
    # 64 inputs, 4 classes: 64 w + w + w w + w + 4 w + 4 with w = 3, 6, 12.
    assert [num_values(model) for model in all_models(fed.job)] == [223, 460, 988]
    assert [model.recipe["settings"]["width"] for model in all_models(fed.job)] == [3, 6, 12]


def test_everybody_trains_the_smallest_and_the_mean_is_weighted(federation: Any) -> None:
    fed = federation("mlp", client_models=THREE, width=6, depth=2)
    fused = fed.fuse(Smallest(local=SETTINGS))
    assert fed.cohort.ledger.exchanges() == ["round_0"]
    assert not fused.personal
    assert fused.model.recipe["settings"]["width"] == 3
    assert fed.job.facts["num_values"] == 223
    small, states = fed.job.model_of("client_1"), []
    for client_id in ("client_0", "client_1", "client_2"):
        module = small.build()
        rng = fed.rng(client_id, "round_0")
        train(module, fed.data[client_id].train, SETTINGS, rng=rng, device=torch.device("cpu"))
        states.append(detached_state(module))
    for name, tensor in fused.model.state.items():
        # 24, 32 and 40 examples.
        mean = (24 * states[0][name].double() + 32 * states[1][name].double() + 40 * states[2][name].double()) / 96
        assert torch.allclose(tensor, mean.float(), atol=1e-6)


@pytest.mark.parametrize("num_rounds", [1, 2])
def test_with_equal_models_it_is_fedavg_and_asks_its_questions(federation: Any, num_rounds: int) -> None:
    fed = federation(width=4, depth=2)
    wanted = fed.fuse(FedAvg(local=SETTINGS, num_rounds=num_rounds)).model
    found = fed.fuse(Smallest(local=SETTINGS, num_rounds=num_rounds)).model
    assert found.digest() == wanted.digest()
    assert all(entry.from_journal for entry in fed.cohort.ledger.entries)


def test_the_second_round_starts_from_the_first_mean(federation: Any) -> None:
    fed = federation("mlp", client_models=THREE, width=6, depth=2)
    fed.fuse(Smallest(local=SETTINGS, num_rounds=2))
    assert not fed.message("round_0", "client_0").group("model")
    sent = fed.message("round_1", "client_0")
    assert sent.number("num_epochs") == 1
    parts = [fed.upload("round_0", f"client_{k}").group("model") for k in range(3)]
    for name, tensor in sent.group("model").items():
        mean = sum(n * part[name].double() for n, part in zip((24, 32, 40), parts, strict=True)) / 96
        assert torch.allclose(tensor, torch.as_tensor(mean).float(), atol=1e-6)


def test_a_model_without_a_recipe_cannot_be_sent() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layer(x) if x.sum() > 0 else self.layer(-x)
            return out

    odd = user_spec(Odd(), input_shape=(3,), num_classes=2, seed=0)
    with pytest.raises(ConfigError) as caught:
        described(odd)
    assert str(caught.value) == (
        "this model cannot be described, so a client that owns another one cannot build it\n"
        "  where: Odd\n"
        "  fix:   use models of a family, or write it with the layers and functions of torch"
    )
    plain = spec("mlp", {"width": 3}, input_shape=(3,), num_classes=2, seed=4)
    assert described(plain)["seed"] == 4


def test_rounds_are_checked() -> None:
    with pytest.raises(ConfigError, match="num_rounds is 0"):
        Smallest(num_rounds=0)
    with pytest.raises(ConfigError, match="2 local epochs cannot be divided over 3 exchanges"):
        Smallest(local=SETTINGS, num_rounds=3)
