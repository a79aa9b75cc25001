"""A frozen, B trained and averaged exactly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_lora import LOCAL, assert_close, changes, lora_federation, mean_of

from fedfuse.core.errors import ConfigError
from fedfuse.methods.ffa_lora import FfaLora


def exact_sum(fed: Any, exchange: str, frozen: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    total = sum(len(data.train) for data in fed.data.values())
    found: dict[str, torch.Tensor] = {}
    for client_id, data in fed.data.items():
        state = {**frozen, **fed.upload(exchange, client_id).group("model")}
        for name, delta in changes(fed.spec, state).items():
            found[name] = found.get(name, torch.zeros_like(delta)) + len(data.train) / total * delta
    return found


@pytest.mark.parametrize("num_rounds", [1, 2])
def test_a_never_moves_or_travels_and_the_mean_is_exact(federation: Any, num_rounds: int) -> None:
    fed = lora_federation(federation)
    fused = fed.fuse(FfaLora(local=LOCAL, num_rounds=num_rounds)).model
    frozen = {key: tensor for key, tensor in fed.spec.build().state_dict().items() if ".lora_A." in key}
    assert len(frozen) == 3
    for key, tensor in frozen.items():
        assert torch.equal(fused.state[key], tensor)
    last = f"left_{num_rounds - 1}"
    assert_close(changes(fused, fused.state), exact_sum(fed, last, frozen))
    for payload in (*fed.runtime.received.values(), *fed.runtime.sent.values()):
        assert not [key for key in payload if ".lora_A." in key]
    assert fed.cohort.ledger.exchanges() == [f"left_{number}" for number in range(num_rounds)]


def test_the_next_round_starts_from_the_mean(federation: Any) -> None:
    fed = lora_federation(federation)
    fed.fuse(FfaLora(local=LOCAL, num_rounds=2))
    sent = fed.message("left_1", "client_2")
    assert sent["num_epochs"] == 2
    for key, tensor in sent.group("model").items():
        torch.testing.assert_close(tensor.double(), mean_of(fed, "left_0", f"model/{key}"), rtol=0, atol=1e-6)


def test_products_of_sums_are_sums_of_products_in_float64() -> None:
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(2, 5, dtype=torch.float64, generator=draw)
    b = torch.randn(3, 6, 2, dtype=torch.float64, generator=draw)
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    one_by_one = sum(w * (left @ a) for w, left in zip(weights, b, strict=True))
    torch.testing.assert_close(torch.einsum("i,ijk->jk", weights, b) @ a, one_by_one, rtol=0, atol=1e-10)


def test_magnitudes_are_refused(federation: Any) -> None:
    with pytest.raises(ConfigError, match="DoRA rescales whole weights, so ffa_lora has no sum of changes to fuse"):
        lora_federation(federation, kind="dora").fuse(FfaLora(local=LOCAL))
