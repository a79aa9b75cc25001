"""The exact sum, truncated to ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_lora import LOCAL, assert_close, changes, lora_federation, weighted

from fedfuse.core.errors import ConfigError, ModelError
from fedfuse.methods.flexlora import FlexLora
from fedfuse.ops.lora import Factors, stacked

RANKS = {"client_0": 1, "client_2": 4}


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def test_the_result_is_the_best_of_its_rank(federation: Any) -> None:
    fed = lora_federation(federation, ranks=RANKS)
    exact = weighted_after(fed, FlexLora(local=LOCAL))
    for rank, wanted_rank in ((None, 4), (1, 1), (3, 3)):
        fused = fed.fuse(FlexLora(local=LOCAL, rank=rank)).model
        assert fed.job.facts["adapter_rank"] == wanted_rank
        assert_close(changes(fused, fused.state), {name: best(d, wanted_rank) for name, d in exact.items()})


def weighted_after(fed: Any, method: FlexLora) -> dict[str, torch.Tensor]:
    fed.fuse(method)
    return weighted(fed, "local_models")


def test_at_the_full_rank_it_is_exact_either_way_in_float64() -> None:
    draw = torch.Generator().manual_seed(0)
    parts = [
        Factors(
            torch.randn(6, 2, dtype=torch.float64, generator=draw),
            torch.randn(2, 5, dtype=torch.float64, generator=draw),
        )
        for _ in range(3)
    ]
    whole = stacked(parts, [0.5, 0.3, 0.2])
    exact = sum(w * part.product() for w, part in zip([0.5, 0.3, 0.2], parts, strict=True))
    for rank in (1, 3, 5):
        ways = [FlexLora(local=LOCAL, decomposition=way).decomposed(whole, rank).product() for way in ("qr", "svd")]
        torch.testing.assert_close(ways[0], best(exact, rank), rtol=0, atol=1e-10)
        torch.testing.assert_close(ways[0], ways[1], rtol=0, atol=1e-10)
    torch.testing.assert_close(ways[0], exact, rtol=0, atol=1e-10)


def test_each_client_goes_on_at_its_own_rank(federation: Any) -> None:
    fed = lora_federation(federation, ranks=RANKS)
    fused = fed.fuse(FlexLora(local=LOCAL, num_rounds=2)).model
    exact = weighted(fed, "round_0")
    for client_id, rank in {"client_1": 2, **RANKS}.items():
        start = fed.message("round_1", client_id).group("model")
        assert_close(changes(fed.job.model_of(client_id), start), {name: best(d, rank) for name, d in exact.items()})
        assert {tensor.shape[0] for key, tensor in start.items() if ".lora_A." in key} == {rank}
    second = weighted(fed, "round_1")
    assert_close(changes(fused, fused.state), {name: best(delta, 4) for name, delta in second.items()})


def test_the_paper_s_own_way_gives_the_same_model(federation: Any) -> None:
    fed = lora_federation(federation)
    found = [fed.fuse(FlexLora(local=LOCAL, decomposition=way)).model for way in ("qr", "svd")]
    assert_close(changes(found[0], found[0].state), changes(found[1], found[1].state))


def test_ranks_that_cannot_be(federation: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        FlexLora(rank=0)
    assert str(caught.value) == "rank is 0\n  where: method.rank\n  fix:   give at least 1"
    fed = lora_federation(federation)
    with pytest.raises(ModelError) as refused:
        fed.fuse(FlexLora(local=LOCAL, rank=10))
    assert str(refused.value) == (
        'the rank 10 is not low for "net.base_model.model.encoder.layer.0.output.dense", which is 12 x 10\n'
        "  where: rank\n  fix:   give a rank below 10"
    )
    assert not fed.runtime.sent
