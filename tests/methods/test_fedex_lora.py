"""Averaged adapters with their residual in the base, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_lora import LOCAL, assert_close, changes, lora_federation, mean_of, weighted

from fedfuse.core.errors import ConfigError
from fedfuse.methods.fedex_lora import FedExLora
from fedfuse.ops.lora import Factors


def test_mean_and_residual_are_the_exact_sum_in_float64() -> None:
    draw = torch.Generator().manual_seed(0)
    parts = [
        Factors(
            torch.randn(7, 2, dtype=torch.float64, generator=draw),
            torch.randn(2, 6, dtype=torch.float64, generator=draw),
        )
        for _ in range(3)
    ]
    exact = sum(w * part.product() for w, part in zip([0.5, 0.3, 0.2], parts, strict=True))
    into_base, stays = FedExLora(local=LOCAL).split(parts, [0.5, 0.3, 0.2])
    assert stays is not None
    assert stays.rank == 2
    torch.testing.assert_close(into_base.product() + stays.product(), exact, rtol=0, atol=1e-10)


def test_the_residual_of_two_scalars() -> None:
    # 0.5 (1*2) + 0.5 (3*4) = 7, the means give 2 * 3 = 6, so 1 is missing.
    parts = [Factors(torch.tensor([[b]]).double(), torch.tensor([[a]]).double()) for b, a in ((1.0, 2.0), (3.0, 4.0))]
    into_base, stays = FedExLora(local=LOCAL).split(parts, [0.5, 0.5])
    assert stays is not None
    assert (stays.product().item(), round(into_base.product().item(), 12)) == (6.0, 1.0)


def test_one_round_is_exact_and_of_the_rank_of_the_sum(federation: Any) -> None:
    fed = lora_federation(federation)
    fused = fed.fuse(FedExLora(local=LOCAL)).model
    assert fed.cohort.ledger.exchanges() == ["local_models"]
    assert_close(changes(fused, fused.state), weighted(fed, "local_models"), atol=5e-6)
    # Three clients of rank 2; that the means are among the summands' combinations adds none.
    assert fed.job.facts["adapter_rank"] == 6


def test_the_second_round_starts_from_the_mean_on_a_base_that_holds_the_rest(federation: Any) -> None:
    fed = lora_federation(federation)
    fused = fed.fuse(FedExLora(local=LOCAL, num_rounds=2)).model
    exact = weighted(fed, "round_0")
    sent = fed.message("round_1", "client_0")
    for key, tensor in sent.group("model").items():
        torch.testing.assert_close(tensor.double(), mean_of(fed, "round_0", f"model/{key}"), rtol=0, atol=1e-6)
    start = changes(fed.spec, sent.group("model"))
    rest = {
        name: left.double() @ sent.tensor(f"folded_right/{name}").double()
        for name, left in sent.group("folded_left").items()
    }
    assert_close({name: start[name] + rest[name] for name in exact}, exact, atol=2e-6)
    second = weighted(fed, "round_1")
    assert_close(changes(fused, fused.state), {name: rest[name] + second[name] for name in rest}, atol=5e-6)


def test_ranks_that_differ_are_refused(federation: Any) -> None:
    fed = lora_federation(federation, ranks={"client_1": 1})
    with pytest.raises(ConfigError, match="weights of different architectures cannot be averaged"):
        fed.fuse(FedExLora(local=LOCAL))
    assert not fed.runtime.sent
