"""Stacked adapters, by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_lora import LENGTH, LOCAL, assert_close, by_hand, changes, lora_federation, mean_of, weighted

from fedfuse.core.errors import ConfigError
from fedfuse.core.payload import Payload
from fedfuse.core.registry import METHODS
from fedfuse.methods.flora import Flora
from fedfuse.methods.tasks import trained_upload
from fedfuse.ops.lora import Factors
from fedfuse.training import predict

RANKS = {"client_0": 1, "client_2": 4}


def test_one_round_is_the_exact_sum_over_clients_of_any_rank(federation: Any) -> None:
    fed = lora_federation(federation, ranks=RANKS)
    fused = fed.fuse(Flora(local=LOCAL)).model
    exact = weighted(fed, "local_models")
    assert_close(changes(fused, fused.state), exact)
    assert fed.job.facts["adapter_rank"] == 1 + 2 + 4
    # The head is the mean, and the model computes what the base with these changes computes.
    heads = {key: mean_of(fed, "local_models", f"model/{key}").float() for key in ("head.weight", "head.bias")}
    for key, head in heads.items():
        torch.testing.assert_close(fused.state[key], head)
    torch.testing.assert_close(
        predict(fused.module(), fed.test.x), predict(by_hand(fed.spec, exact, heads), fed.test.x), rtol=1e-4, atol=1e-5
    )


def test_the_split_is_exact_in_float64() -> None:
    draw = torch.Generator().manual_seed(0)
    parts = [
        Factors(
            torch.randn(6, rank, dtype=torch.float64, generator=draw),
            torch.randn(rank, 5, dtype=torch.float64, generator=draw),
        )
        for rank in (1, 3, 2)
    ]
    exact = sum(w * part.product() for w, part in zip([0.5, 0.3, 0.2], parts, strict=True))
    into_base, stays = Flora(local=LOCAL).split(parts, [0.5, 0.3, 0.2])
    assert stays is None
    assert into_base.rank == 5  # 1 + 3 + 2 is more than the weight has
    torch.testing.assert_close(into_base.product(), exact, rtol=0, atol=1e-10)


def test_two_rounds_by_hand(federation: Any) -> None:
    fed = lora_federation(federation, ranks=RANKS)
    fused = fed.fuse(Flora(local=LOCAL, num_rounds=2)).model
    first, second = weighted(fed, "round_0"), weighted(fed, "round_1")
    assert_close(changes(fused, fused.state), {name: first[name] + second[name] for name in first}, atol=5e-6)
    for client_id in fed.data:
        sent = fed.message("round_1", client_id)
        found = {
            name: left.double() @ sent.tensor(f"folded_right/{name}").double()
            for name, left in sent.group("folded_left").items()
        }
        assert_close(found, first)
        # Beside the change only the head travels: adapters start anew.
        assert sorted(sent.group("model")) == ["head.bias", "head.weight"]
        assert sent["num_epochs"] == 2
    # And a client's second round is plain training on the changed base.
    client_id = "client_1"
    sent = fed.message("round_1", client_id)
    module = by_hand(fed.job.model_of(client_id), first, sent.group("model"))
    client = _client(fed, client_id, "round_1")
    with client.rng.ambient("task"):
        again = trained_upload(module, client, LOCAL, Payload({"num_epochs": 2})).group("model")
    for key, tensor in fed.upload("round_1", client_id).group("model").items():
        torch.testing.assert_close(tensor, again[key], rtol=1e-3, atol=1e-5)


def _client(fed: Any, client_id: str, exchange: str) -> Any:
    from fedfuse.core.client import Client

    return Client(
        client_id,
        fed.data[client_id],
        fed.job.model_of(client_id),
        Payload(),
        fed.rng(client_id, exchange),
        torch.device("cpu"),
    )


def test_who_was_away_gets_what_was_missed(federation: Any) -> None:
    fed = lora_federation(federation, absent={("round_1", "client_1")}, quorum=0.6)
    fed.fuse(Flora(local=LOCAL, num_rounds=3))
    name = next(iter(fed.message("round_2", "client_0").group("folded_left")))
    product = {
        (exchange, client_id): fed.message(exchange, client_id).tensor(f"folded_left/{name}").double()
        @ fed.message(exchange, client_id).tensor(f"folded_right/{name}").double()
        for exchange in ("round_1", "round_2")
        for client_id in ("client_0", "client_1")
    }
    assert torch.equal(product["round_1", "client_0"], product["round_1", "client_1"])
    both = product["round_1", "client_0"] + product["round_2", "client_0"]
    torch.testing.assert_close(product["round_2", "client_1"], both, rtol=0, atol=1e-6)
    # What they keep agrees, whenever it came.
    kept = [fed.kept(client_id)[-1] for client_id in ("client_0", "client_1")]
    found = [k.tensor(f"folded_left/{name}").double() @ k.tensor(f"folded_right/{name}").double() for k in kept]
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)


def test_all_one_round_methods_share_one_training(federation: Any) -> None:
    fed = lora_federation(federation)
    fed.fuse(METHODS.get("fedavg")(local=LOCAL))
    for name in ("fedit", "flora", "fedex_lora", "flexlora"):
        fed.fuse(METHODS.get(name)(local=LOCAL))
        assert fed.cohort.ledger.exchanges() == ["local_models"]
        assert all(entry.from_journal for entry in fed.cohort.ledger.entries), name
    # So do they in the first of many rounds.
    fed.fuse(METHODS.get("fedavg")(local=LOCAL, num_rounds=2))
    for name in ("fedit", "flora", "fedex_lora", "flexlora"):
        fed.fuse(METHODS.get(name)(local=LOCAL, num_rounds=2))
        assert {e.from_journal for e in fed.cohort.ledger.entries if e.exchange == "round_0"} == {True}, name


# --- what is refused


def refused(fed: Any, method: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        fed.fuse(method)
    assert not fed.runtime.sent
    return str(caught.value)


def test_a_model_without_lora(federation: Any) -> None:
    assert refused(federation("mlp", width=4, depth=1), Flora(local=LOCAL)) == (
        "the model has no LoRA adapter\n  where: model.peft\n  fix:   set model.peft to {kind: lora, rank: 8}"
    )


def test_magnitudes(federation: Any) -> None:
    assert refused(lora_federation(federation, kind="dora"), Flora(local=LOCAL)) == (
        "DoRA rescales whole weights, so flora has no sum of changes to fuse\n"
        "  where: model.peft.kind\n  fix:   use kind: lora or rslora, or the method fedit"
    )


@pytest.mark.parametrize(
    ("peft", "what"),
    [
        ({"config": {"hidden_act": "relu"}}, "this client has another base model than the others"),
        ({"peft": {"target_modules": ["value"]}}, "this client's adapter changes other weights than the others'"),
    ],
)
def test_clients_that_do_not_fit_together(federation: Any, peft: dict[str, Any], what: str) -> None:
    from tiny_lora import settings

    own = settings()
    own["config"] |= peft.get("config", {})
    own["peft"] |= peft.get("peft", {})
    fed = federation(
        "transformers", input_shape=(LENGTH,), client_models={"client_1": ("transformers", own)}, **settings()
    )
    assert refused(fed, Flora(local=LOCAL)) == (
        f"{what}\n  where: model.clients.client_1\n  fix:   let clients differ in peft.rank and peft.lora_alpha only"
    )


def test_a_rank_that_is_not_low(federation: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        lora_federation(federation, rank=10)
    assert str(caught.value) == (
        'the rank 10 is not low for "encoder.layer.0.output.dense", which is 12 x 10\n'
        "  where: model.peft.rank\n  fix:   give a rank below 10"
    )


def test_no_rounds() -> None:
    with pytest.raises(ConfigError) as caught:
        Flora(num_rounds=0)
    assert str(caught.value) == "num_rounds is 0\n  where: method.num_rounds\n  fix:   give at least 1"
