"""Models of different sizes that share the experts of their adapters."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from text_sizes import run_texts, text_models, texts
from torch import Tensor

from fedfuse.core.errors import ConfigError
from fedfuse.core.method import Fused
from fedfuse.methods.heterotune import HeteroTune, damped
from fedfuse.models.foundation.dema import MixtureShape
from fedfuse.models.foundation.placing import Plan
from fedfuse.ops.gradient_alignment import mean_update
from fedfuse.ops.local_steps import gradient_weights
from fedfuse.training import LocalSGD, evaluate, predict, step_rates

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)
SIZES = {"client_0": ("cnn", {"width": 4, "depth": 2}), "client_1": ("mlp", {"width": 8, "depth": 3})}
LARGE = {"width": 6, "depth": 2}
COUNTS = {"client_0": 24, "client_1": 32, "client_2": 40}


def shared(payload: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = payload.group("shared")
    return found


@pytest.mark.parametrize("aligns", [True, False])
def test_experts_are_averaged_over_sizes_and_all_else_stays(federation: Any, aligns: bool) -> None:
    fed = federation(client_models=SIZES, **LARGE)
    fused = fed.fuse(HeteroTune(local=SETTINGS, rank=3, align_updates=aligns))
    assert fed.cohort.ledger.exchanges() == ["round_0", "finish"]
    uploads = {c: shared(fed.upload("round_0", c)) for c in COUNTS}
    first = MixtureShape(2, 3, 3, fed.spec.seed).first_shared()
    final = shared(fed.message("finish", "client_0"))
    # From the smallest to the largest: the names by which opposed updates are ordered.
    order = sorted(COUNTS, key=lambda c: sum(p.numel() for p in fed.job.model_of(c).build().parameters()))
    for name, tensor in first.items():
        updates = {f"{k}": uploads[c][name].double() - tensor.double() for k, c in enumerate(order)}
        weights = {f"{k}": float(COUNTS[c]) for k, c in enumerate(order)}
        wanted = tensor.double() + mean_update(updates, weights, aligns=aligns)
        assert torch.allclose(final[name], wanted.float(), atol=1e-6)
    for client_id, artifact in fused.personal.items():
        assert all(torch.equal(artifact.state[name], final[name]) for name in final)
        own = fed.upload("finish", client_id).group("own")
        assert sorted(own) == sorted(set(artifact.state) - set(final))
        assert predict(artifact.module(), fed.test.x).shape == (60, 4)


def test_what_travels_in_a_round_does_not_depend_on_the_size_of_the_model(federation: Any) -> None:
    fed = federation(client_models=SIZES, **LARGE)
    fed.fuse(HeteroTune(local=SETTINGS, rank=3))
    # Two positions with three experts of 3 x 3 and three shares.
    assert {sum(t.numel() for t in shared(fed.upload("round_0", c)).values()) for c in COUNTS} == {2 * (27 + 3)}
    assert {fed.message("round_0", c)["expert"] for c in COUNTS} == {0, 1, 2}
    # In the first round everyone has the first experts already.
    assert not shared(fed.message("round_0", "client_0"))


def test_without_collect_own_parts_stay_at_the_client(federation: Any) -> None:
    fed = federation(client_models=SIZES, **LARGE)
    fused = fed.fuse(HeteroTune(local=SETTINGS, rank=3, collect=False, adopts=False))
    assert fused == Fused()
    assert list(fed.upload("finish", "client_1")) == ["num_examples"]
    kept = fed.kept("client_1")[-1]
    assert sorted({key.split("/")[0] for key in kept}) == ["last", "own"]
    assert all(torch.equal(kept.group("last")[n], t) for n, t in shared(fed.message("finish", "client_1")).items())


def test_adopting_trains_the_own_part_with_the_experts_fixed(federation: Any) -> None:
    fed = federation(client_models=SIZES, **LARGE)
    fed.fuse(HeteroTune(local=SETTINGS, rank=3))
    assert [fed.message(key, "client_0").number("num_epochs") for key in ("round_0", "finish")] == [1, 1]
    before, after = (state.group("own") for state in fed.kept("client_0"))
    assert not torch.equal(before["mixtures.0.down"], after["mixtures.0.down"])
    other = federation(client_models=SIZES, **LARGE)
    other.fuse(HeteroTune(local=SETTINGS, rank=3, adopts=False))
    assert [other.message(key, "client_0").number("num_epochs") for key in ("round_0", "finish")] == [2, 0]
    before, after = (state.group("own") for state in other.kept("client_0"))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_the_gradient_of_the_last_aggregate_is_added_in_the_second_round(federation: Any) -> None:
    settings = LocalSGD(num_epochs=2, batch_size=64, momentum=0.0, learning_rate=0.1)
    moved = []
    for strength in (0.0, 2.0):
        fed = federation("mlp", width=6, depth=3)
        fed.fuse(HeteroTune(local=settings, rank=2, num_rounds=2, adopts=False, align_gradients=strength))
        moved.append((fed, shared(fed.upload("round_1", "client_0"))))
    fed, plain = moved[0]
    first = MixtureShape(2, 1, 2, fed.spec.seed).first_shared()
    start = shared(fed.message("round_1", "client_0"))
    # One step per round, so the last aggregate is a step of its own length, and it is added twice.
    length = float(gradient_weights(step_rates(settings, 24, 1), 0.0).sum())
    assert length == pytest.approx(0.1)
    for name, tensor in start.items():
        assert torch.allclose(moved[1][1][name] - plain[name], 2.0 * (tensor - first[name]), atol=1e-6)


def test_with_one_size_and_one_client_the_experts_are_its_own(federation: Any) -> None:
    fed = federation("mlp", num_clients=1, width=6, depth=3)
    fed.fuse(HeteroTune(local=SETTINGS, rank=2, adopts=False))
    upload, final = (shared(p) for p in (fed.upload("round_0", "client_0"), fed.message("finish", "client_0")))
    assert all(torch.allclose(final[name], upload[name], atol=1e-7) for name in upload)
    assert fed.job.facts["conflicts"] == [0.0]


def test_of_the_experts_of_other_sizes_a_part_of_the_change_is_told() -> None:
    first = {
        "mixtures.0.experts.0": torch.zeros(1),
        "mixtures.0.experts.1": torch.ones(1),
        "mixtures.0.shares": torch.zeros(2),
    }
    trained = {name: tensor + 4.0 for name, tensor in first.items()}
    found = damped(first, trained, 0, 0.25)
    assert [tensor.tolist() for tensor in found.values()] == [[4.0], [2.0], [4.0, 4.0]]


def test_what_cannot_be_is_refused() -> None:
    adamw = LocalSGD(optimizer="adamw")
    for settings, message in (
        ({"rank": 0}, "rank is 0"),
        ({"num_positions": 0}, "num_positions is 0"),
        ({"other_rate": 1.5}, "other_rate is 1.5"),
        ({"align_gradients": -1.0}, "align_gradients is -1.0"),
        (
            {"align_gradients": 1.0, "local": adamw},
            "align_gradients needs to know how far a gradient moves the weights",
        ),
        ({"local": LocalSGD(num_epochs=1)}, "1 local epochs cannot be divided over 2 exchanges"),
    ):
        with pytest.raises(ConfigError, match=message):
            HeteroTune(**settings)


def test_three_sizes_of_one_family_and_a_second_family_learn_together() -> None:
    pytest.importorskip("transformers")
    models = text_models("a", "b", "c", "d")
    local = LocalSGD(num_epochs=12, batch_size=16, learning_rate=0.03, optimizer="adamw")
    fused, cohort, job = run_texts(models, HeteroTune(local=local, rank=4, num_rounds=2))
    assert [size["clients"] for size in job.facts["sizes"]] == [["d"], ["a"], ["b"], ["c"]]
    test = texts(200, 99)
    for client_id, artifact in fused.personal.items():
        assert artifact.recipe["of"] == models[client_id].recipe
        # A third would be chance; the bases are random and frozen.
        assert evaluate(artifact.module(), test).accuracy > 0.5
        # The base is not in it.
        head_and_mixtures = Plan(models[client_id], MixtureShape(2, 4, 4, 2)).build().state_dict()
        assert sorted(artifact.state) == sorted(head_and_mixtures)
    sent = {e.client: e.upload_bytes for e in cohort.ledger.entries if e.exchange == "round_0"}
    # Two positions with four experts of 4 x 4 and four shares, in 4 bytes each, and what names them.
    assert len(set(sent.values())) == 1
    assert 4 * 2 * (64 + 4) < sent["a"] < 4 * 2 * (64 + 4) + 1500
