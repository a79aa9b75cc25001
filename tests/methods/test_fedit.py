"""FedAvg of adapters, and what it gets wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_lora import LOCAL, changes, lora_federation, mean_of, weighted

from fedfuse.core.errors import ConfigError
from fedfuse.methods.fedavg import FedAvg
from fedfuse.methods.fedit import FedIT


def test_it_is_the_mean_of_each_factor(federation: Any) -> None:
    fed = lora_federation(federation)
    fused = fed.fuse(FedIT(local=LOCAL)).model
    for key, tensor in fused.state.items():
        torch.testing.assert_close(tensor.double(), mean_of(fed, "local_models", f"model/{key}"), rtol=0, atol=1e-6)
    # Which is not the mean of the products.
    exact = weighted(fed, "local_models")
    found = changes(fused, fused.state)
    assert any(float((found[name] - delta).norm() / delta.norm()) > 0.01 for name, delta in exact.items())


@pytest.mark.parametrize("num_rounds", [1, 2])
def test_it_is_fedavg_bit_by_bit(federation: Any, num_rounds: int) -> None:
    fed = lora_federation(federation)
    plain = fed.fuse(FedAvg(local=LOCAL, num_rounds=num_rounds)).model
    assert fed.fuse(FedIT(local=LOCAL, num_rounds=num_rounds)).model.digest() == plain.digest()


def test_magnitudes_are_averaged_too(federation: Any) -> None:
    fed = lora_federation(federation, kind="dora")
    fused = fed.fuse(FedIT(local=LOCAL)).model
    (key, *_) = [key for key in fused.state if "magnitude" in key]
    torch.testing.assert_close(
        fused.state[key].double(), mean_of(fed, "local_models", f"model/{key}"), rtol=0, atol=1e-6
    )


def test_a_model_without_adapters_or_with_different_ones(federation: Any) -> None:
    with pytest.raises(ConfigError, match="the model has no LoRA adapter"):
        lora_federation(federation, kind="bias").fuse(FedIT(local=LOCAL))
    with pytest.raises(ConfigError, match="weights of different architectures cannot be averaged"):
        lora_federation(federation, ranks={"client_1": 1}).fuse(FedIT(local=LOCAL))
