"""Square cores between fixed matrices, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_lora import LOCAL, PLAIN, assert_close, changes, lora_federation, mean_of
from torch.nn import functional as F

from fedfuse.core.errors import ConfigError, ModelError
from fedfuse.methods.fed_sb import Between, FedSB
from fedfuse.models.foundation import Foundation, lora_layout

GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 16,
    "n_embd": 12,
    "n_layer": 1,
    "n_head": 2,
    "n_positions": 12,
    "attn_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "initializer_range": 0.3,
}


def gradients(fed: Any, client_id: str) -> dict[str, torch.Tensor]:
    """Of the whole weights at the base model, over all of a client's examples at once, as ``(d_out, d_in)``."""
    module = fed.spec.build().eval()
    assert isinstance(module, Foundation)
    train = fed.data[client_id].train
    names = list(lora_layout(fed.spec).modules)
    weights = [module.weight_of(name).requires_grad_(True) for name in names]
    found = torch.autograd.grad(F.cross_entropy(module(train.x), train.y), weights)
    shapes = {name: place.shape for name, place in lora_layout(fed.spec).modules.items()}
    return {name: (g if tuple(g.shape) == shapes[name] else g.T).double() for name, g in zip(names, found, strict=True)}


def leading(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    u, s, vh = torch.linalg.svd(matrix)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("config", [PLAIN, GPT2], ids=["bert", "gpt2"])
def test_the_first_update_is_the_leading_part_of_the_gradient(federation: Any, config: dict[str, Any]) -> None:
    fed = lora_federation(federation, config=config)
    fed.fuse(FedSB(local=LOCAL))
    total = sum(len(data.train) for data in fed.data.values())
    summed: dict[str, torch.Tensor] = {}
    for client_id, data in fed.data.items():
        upload = fed.upload("first_update", client_id)
        for name, gradient in gradients(fed, client_id).items():
            part = upload.tensor(f"left/{name}").double() @ upload.tensor(f"right/{name}").double()
            torch.testing.assert_close(part, leading(gradient, 2), rtol=0, atol=1e-5)
            summed[name] = summed.get(name, torch.zeros_like(part)) + len(data.train) / total * part
    # B and A span the leading part of the sum, and the first core makes the step of SGD.
    sent = fed.message("cores_0", "client_1")
    for name, whole in summed.items():
        left, right = sent.tensor(f"left/{name}").double(), sent.tensor(f"right/{name}").double()
        torch.testing.assert_close(left.T @ left, torch.eye(2).double(), rtol=0, atol=1e-6)
        torch.testing.assert_close(right @ right.T, torch.eye(2).double(), rtol=0, atol=1e-6)
        scale = lora_layout(fed.spec).modules[name].scale
        start = scale * left @ sent.tensor(f"core/{name}").double() @ right
        torch.testing.assert_close(start, -LOCAL.learning_rate * leading(whole, 2), rtol=0, atol=1e-5)


def test_only_cores_are_trained_and_their_mean_is_exact(federation: Any) -> None:
    fed = lora_federation(federation)
    fused = fed.fuse(FedSB(local=LOCAL)).model
    total = sum(len(data.train) for data in fed.data.values())
    sent = fed.message("cores_0", "client_0")
    exact: dict[str, torch.Tensor] = {}
    for client_id, data in fed.data.items():
        for name, core in fed.upload("cores_0", client_id).group("core").items():
            assert not torch.equal(core, sent.tensor(f"core/{name}"))
            scale = lora_layout(fed.spec).modules[name].scale
            left, right = sent.tensor(f"left/{name}").double(), sent.tensor(f"right/{name}").double()
            delta = len(data.train) / total * scale * left @ core.double() @ right
            exact[name] = exact.get(name, torch.zeros_like(delta)) + delta
    assert_close(changes(fused, fused.state), exact)
    assert fed.job.facts["adapter_rank"] == 2
    torch.testing.assert_close(
        fused.state["head.bias"].double(), mean_of(fed, "cores_0", "model/head.bias"), rtol=0, atol=1e-6
    )


def test_a_step_on_a_core_is_the_chain_rule() -> None:
    # The weight is B R: its gradient G gives B^T G for R.
    left, core = torch.randn(5, 2, generator=torch.Generator().manual_seed(0)), torch.eye(2)
    square = Between(left, core)
    assert torch.equal(square.right_inverse(torch.zeros(5, 2)), core)
    r = core.clone().requires_grad_(True)
    g = torch.arange(10.0).view(5, 2)
    (square(r) * g).sum().backward()
    torch.testing.assert_close(r.grad, left.T @ g)


@pytest.mark.parametrize(("num_clients", "rank"), [(2, 2), (4, 2), (2, 4)])
def test_bytes_of_a_round_are_r_squared_per_weight_whoever_takes_part(
    federation: Any, num_clients: int, rank: int
) -> None:
    fed = lora_federation(federation, rank=rank, num_clients=num_clients)
    fed.fuse(FedSB(local=LOCAL, num_rounds=2))
    layout = lora_layout(fed.spec)
    assert len(layout.modules) == 3
    head = 4 * 12 + 4
    for client_id in fed.data:
        for number in (0, 1):
            upload = fed.upload(f"cores_{number}", client_id)
            cores = upload.group("core")
            assert sum(core.numel() for core in cores.values()) == 3 * rank**2
            assert sum(tensor.numel() for tensor in upload.group("model").values()) == head
        down = fed.message("cores_1", client_id)
        assert sum(tensor.numel() for tensor in down.group("core").values()) == 3 * rank**2
        assert not down.group("left")
        assert sum(tensor.numel() for tensor in down.group("model").values()) == head
    ledger = fed.cohort.ledger
    assert ledger.exchanges() == ["first_update", "cores_0", "cores_1"]
    # The ledger counts all three: the first about one LoRA adapter, the others the cores.
    first = {entry.upload_bytes for entry in ledger.entries if entry.exchange == "first_update"}
    numbers = sum(rank * sum(place.shape) for place in layout.modules.values())
    assert len(first) == 1
    assert 4 * numbers < first.pop() < 4 * numbers + 1000


def test_who_was_away_gets_the_matrices_later(federation: Any) -> None:
    fed = lora_federation(federation, absent={("cores_0", "client_1")}, quorum=0.6)
    fed.fuse(FedSB(local=LOCAL, num_rounds=2))
    late, others = fed.message("cores_1", "client_1"), fed.message("cores_1", "client_0")
    assert not others.group("left")
    for name, left in fed.message("cores_0", "client_0").group("left").items():
        assert torch.equal(late.tensor(f"left/{name}"), left)
    for name, core in others.group("core").items():
        assert torch.equal(late.tensor(f"core/{name}"), core)


def test_a_rank_of_its_own_above_the_adapter_s(federation: Any) -> None:
    fed = lora_federation(federation)
    fused = fed.fuse(FedSB(local=LOCAL, rank=6)).model
    assert fed.job.facts["adapter_rank"] == 6
    sent = fed.message("cores_0", "client_0")
    name = next(iter(sent.group("core")))
    assert sent.tensor(f"core/{name}").shape == (6, 6)
    change = changes(fused, fused.state)[name]
    product = mean_of(fed, "cores_0", f"core/{name}")  # the scale is 1 where the method chooses the rank
    wanted = sent.tensor(f"left/{name}").double() @ product @ sent.tensor(f"right/{name}").double()
    torch.testing.assert_close(change, wanted, rtol=0, atol=2e-6)
    with pytest.raises(ModelError, match="the rank 10 is not low for"):
        fed.fuse(FedSB(local=LOCAL, rank=10))


def test_no_examples_for_the_first_update() -> None:
    with pytest.raises(ConfigError) as caught:
        FedSB(num_first_examples=0)
    assert str(caught.value) == (
        "num_first_examples is 0\n  where: method.num_first_examples\n  fix:   give at least 1"
    )
