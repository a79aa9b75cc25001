"""FedKSeed: what crosses are slopes, and they are enough."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_lora import lora_federation

from fedfuse.core.artifact import detached_state
from fedfuse.core.errors import ConfigError, PayloadError
from fedfuse.core.payload import Payload
from fedfuse.methods.changes import trained_parameters
from fedfuse.methods.fedkseed import FedKSeed, directions_of, put_sums, read_sums
from fedfuse.ops.zeroth_order import seed_probabilities, shift_by_sums
from fedfuse.training import evaluate
from fedfuse.training.zeroth_order import LocalZerothOrder, train_without_gradients

LOCAL = LocalZerothOrder(num_steps=40, learning_rate=0.02, perturbation=1e-2, batch_size=16)


def method(**settings: Any) -> FedKSeed:
    return FedKSeed(**{"local": LOCAL, "num_rounds": 1, "num_seeds": 32, **settings})


def sums_of(fed: Any, exchange: str, client_id: str, num_seeds: int = 32) -> torch.Tensor:
    return read_sums(fed.upload(exchange, client_id), "seeds", num_seeds)


def rebuilt(fed: Any, sums: torch.Tensor, learning_rate: float = LOCAL.learning_rate) -> dict[str, torch.Tensor]:
    """The trained weights that sums stand for, in float64."""
    named = trained_parameters(fed.spec.build())
    tensors = [p.detach().double() for p in named.values()]
    shift_by_sums(tensors, directions_of(fed.spec), dict(enumerate(sums.tolist())), -learning_rate)
    return dict(zip(named, tensors, strict=True))


def test_one_client_gives_that_clients_own_model(federation: Any) -> None:
    fed = federation(width=4, depth=2, num_clients=1)
    fused = fed.fuse(method())

    own = fed.spec.build()
    with fed.rng("client_0", "round_0").ambient("task"):
        found = train_without_gradients(
            own,
            fed.data["client_0"].train,
            LOCAL,
            num_steps=40,
            probabilities=torch.full((32,), 1 / 32),
            directions=directions_of(fed.spec),
            rng=fed.rng("client_0", "round_0"),
            device=torch.device("cpu"),
        )
    torch.testing.assert_close(sums_of(fed, "round_0", "client_0"), found.sums.float().double())
    for name, tensor in detached_state(own).items():
        torch.testing.assert_close(fused.model.state[name], tensor, rtol=1e-5, atol=2e-5)


def test_the_server_adds_up_slopes_by_numbers_of_examples(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fused = fed.fuse(method(num_rounds=2))

    # 24, 32 and 40 examples.
    rounds = [
        sum(n / 96 * sums_of(fed, f"round_{r}", f"client_{c}") for c, n in enumerate((24, 32, 40))) for r in (0, 1)
    ]
    sent = read_sums(fed.message("round_1", "client_2"), "total", 32)
    torch.testing.assert_close(sent, rounds[0].float().double())
    for name, tensor in rebuilt(fed, rounds[0] + rounds[1]).items():
        torch.testing.assert_close(fused.model.state[name].double(), tensor, rtol=1e-5, atol=1e-5)
    assert "model/0.weight" not in fed.message("round_1", "client_0")
    # Running statistics are no direction's: they are averaged.
    means = [
        n / 96 * fed.upload("round_1", f"client_{c}").tensor("buffer/1.running_mean")
        for c, n in enumerate((24, 32, 40))
    ]
    torch.testing.assert_close(fused.model.state["1.running_mean"], sum(means))


def test_an_upload_stays_under_18_kb_whatever_was_taken(federation: Any) -> None:
    everything = put_sums(Payload(), "seeds", torch.ones(4096), torch.ones(4096, dtype=torch.bool))
    everything["num_examples"] = 10
    assert len(everything.encode()) < 18_000

    fed = federation("mlp", width=64, depth=2)
    fed.fuse(method(num_seeds=4096, local=LocalZerothOrder(num_steps=200, batch_size=8)))
    assert sum(p.numel() for p in fed.spec.build().parameters()) * 4 > 32_000
    # 200 steps: half a kilobyte of bits, at most 800 bytes of slopes, the loss of each step, and names.
    assert max(fed.runtime.upload_bytes.values()) < 3_000
    assert all(entry.upload_bytes < 18_000 for entry in fed.cohort.ledger.entries)


def test_it_learns(federation: Any) -> None:
    fed = federation("mlp", width=16, depth=1)
    local = LocalZerothOrder(num_steps=600, learning_rate=0.01, perturbation=1e-2, batch_size=32)
    fused = fed.fuse(method(num_seeds=512, num_rounds=3, local=local))

    before = evaluate(fed.spec.build(), fed.test)
    after = evaluate(fused.model.module(), fed.test)
    assert after.loss < 0.8 * before.loss
    assert after.accuracy > 0.6


def test_larger_slopes_are_looked_for_more_often(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1)
    fed.fuse(method(num_rounds=2, sampling="magnitude"))

    sizes, counts = torch.zeros(32).double(), torch.zeros(32).double()
    for client_id in ("client_0", "client_1", "client_2"):
        upload = fed.upload("round_0", client_id)
        taken = [number for number in range(32) if upload.tensor("seeds/taken")[number // 8] >> number % 8 & 1]
        sizes[taken] += upload.tensor("seeds/sizes").double()
        counts[taken] += 1
    sent = fed.message("round_1", "client_0").tensor("probabilities")
    torch.testing.assert_close(sent, seed_probabilities(sizes / counts))
    assert "probabilities" not in fed.message("round_0", "client_0")


def test_of_an_adapter_only_the_adapter_moves(federation: Any) -> None:
    fed = lora_federation(federation)
    fused = fed.fuse(method(local=LocalZerothOrder(num_steps=10, batch_size=8)))

    first = detached_state(fed.spec.build())
    assert set(fused.model.state) == set(first)
    assert all("lora_" in name or "classifier" in name or "head" in name for name in first)
    assert any(not torch.equal(tensor, first[name]) for name, tensor in fused.model.state.items())


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"num_seeds": 0}, "num_seeds is 0\n  where: method.num_seeds\n  fix:   give at least 1"),
        ({"num_rounds": 0}, "num_rounds is 0\n  where: method.num_rounds\n  fix:   give at least 1"),
        (
            {"num_rounds": 50},
            (
                "40 local steps cannot be divided over 50 exchanges\n"
                "  where: method.local.num_steps\n  fix:   give at least 50"
            ),
        ),
    ],
)
def test_a_wrong_setting_is_told(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        method(**settings)
    assert str(caught.value) == error


def test_sums_that_do_not_fit_their_bits_are_refused() -> None:
    payload = put_sums(Payload(), "seeds", torch.ones(16), torch.arange(16) < 3)
    payload["seeds/sums"] = torch.ones(4)
    with pytest.raises(PayloadError, match="3 seeds have 4 sums"):
        read_sums(payload, "seeds", 16)
