"""FuseFL: the fused network against its composition by hand, its heads, and what is refused."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedfuse.core.artifact import Artifact, load_state
from fedfuse.core.errors import ConfigError, ModelError
from fedfuse.core.registry import MODELS
from fedfuse.methods.feature_ensemble import FeatureEnsemble
from fedfuse.methods.fusefl import FuseFL
from fedfuse.methods.heads import Head, joint_head
from fedfuse.methods.tasks import read_moments
from fedfuse.ops.moments import lda_head, pool
from fedfuse.training import LocalSGD, predict, train

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)
SMALL = {"width": 4, "depth": 4}
IDS = ["client_0", "client_1", "client_2"]

FAMILIES: dict[str, dict[str, Any]] = {
    "cnn": SMALL,
    "mlp": {"width": 8, "depth": 3},
    "resnet": {"width": 2},
    "vit": {"width": 8, "depth": 2, "heads": 2},
}


def fusefl_of(**settings: Any) -> FuseFL:
    return FuseFL(**{"num_blocks": 2, "local": SETTINGS, **settings})


@pytest.mark.parametrize("adaptor", ["conv1x1", "mean", "attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_artifact_is_the_composition_of_the_uploaded_blocks(
    federation: Any, x: Tensor, family: str, adaptor: Any
) -> None:
    if family not in MODELS.names():
        pytest.skip(f"there is no {family} yet")
    fed = federation(family, num_clients=2, **FAMILIES[family])
    method = fusefl_of(adaptor=adaptor)
    fused = fed.fuse(method)
    moments = pool(read_moments(fed.upload("moments", c)) for c in fed.cohort.client_ids)
    weights, biases = lda_head(moments)
    features = fed.composed(method, x)
    wanted = features.double() @ weights.T + biases
    torch.testing.assert_close(predict(fused.model.module(), x).double(), wanted, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("num_blocks", [1, 2, 4, 8])
def test_any_number_of_blocks(federation: Any, x: Tensor, num_blocks: int, tmp_path: Any) -> None:
    fed = federation(num_clients=2, width=4, depth=8)
    fused = fed.fuse(fusefl_of(num_blocks=num_blocks, local=LocalSGD(num_epochs=8, batch_size=32)))
    exchanges = [f"block_{k}" for k in range(num_blocks)]
    assert fed.cohort.ledger.exchanges() == [*exchanges, "moments"]
    epochs = [fed.message(key, "client_0")["num_epochs"] for key in exchanges]
    assert epochs == [8 // num_blocks] * num_blocks
    assert [len(level) for level in fused.model.recipe["levels"]] == [2] * num_blocks
    again = Artifact.read(fused.model.save(tmp_path / "artifact"))
    assert torch.equal(predict(again.module(), x), predict(fused.model.module(), x))
    assert fed.job.facts["num_blocks"] == num_blocks
    assert fed.job.facts["num_parameters"] == sum(p.numel() for p in fused.model.module().parameters())


def test_epochs_that_do_not_divide_evenly_go_to_the_first_blocks(federation: Any) -> None:
    fed = federation(**SMALL)
    fed.fuse(fusefl_of(num_blocks=3, local=LocalSGD(num_epochs=5, batch_size=16)))
    assert [fed.message(f"block_{k}", "client_2")["num_epochs"] for k in range(3)] == [2, 2, 1]
    assert [len(fed.upload(f"block_{k}", "client_2").tensor("curve/train_loss")) for k in range(3)] == [2, 2, 1]


def test_one_block_is_feature_ensemble(federation: Any, x: Tensor) -> None:
    # Whole batches: the exchanges have different names, so the order of examples differs, and sums are rounded apart.
    settings = LocalSGD(num_epochs=2, batch_size=64)
    fed = federation(width=4, depth=2)
    for head in (Head(kind="ensemble"), Head(kind="average")):
        one = fed.fuse(fusefl_of(num_blocks=1, local=settings, head=head))
        isolated = fed.fuse(FeatureEnsemble(local=settings, head=head))
        torch.testing.assert_close(
            predict(one.model.module(), x), predict(isolated.model.module(), x), rtol=1e-3, atol=1e-4
        )


def test_the_first_block_is_that_of_the_whole_network_trained_alone(federation: Any) -> None:
    fed = federation(**SMALL)
    fed.fuse(fusefl_of(local=LocalSGD(num_epochs=3, batch_size=16)))
    module = fed.spec.build()
    train(
        module,
        fed.data["client_1"].train,
        SETTINGS,
        rng=fed.rng("client_1", "block_0"),
        device=torch.device("cpu"),
        num_epochs=2,
    )
    uploaded, whole = fed.upload("block_0", "client_1").group("block"), module.state_dict()
    assert uploaded
    for name, tensor in uploaded.items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["average", "ensemble", "calibrated", "lda"])
def test_every_head(federation: Any, x: Tensor, kind: Any) -> None:
    fed = federation(**SMALL)
    head = Head(kind=kind, num_draws=20, num_epochs=1)
    method = fusefl_of(head=head)
    fused = fed.fuse(method)
    asks = kind in ("lda", "calibrated")
    assert fed.cohort.ledger.exchanges() == ["block_0", "block_1"] + ["moments"] * asks
    features, logits = fed.composed(method, x), predict(fused.model.module(), x)
    uploads = [fed.upload("block_1", c).group("head") for c in IDS]
    if kind == "average":
        weight, bias = (torch.stack([u[name] for u in uploads]).mean(0) for name in ("weight", "bias"))
        torch.testing.assert_close(logits, features @ weight.T + bias, rtol=1e-4, atol=1e-4)
    if kind == "ensemble":
        heads = []
        for upload in uploads:
            heads.append(nn.Linear(*reversed(upload["weight"].shape)))
            load_state(heads[-1], upload)
        torch.testing.assert_close(logits, joint_head(heads)(features).detach(), rtol=1e-4, atol=1e-4)
    if kind == "calibrated":
        width = uploads[0]["weight"].shape[1]
        assert fed.upload("moments", "client_0").tensor("moments/scatter").shape == (4, width * (width + 1) // 2)


def test_it_learns_what_no_client_knows_alone(federation: Any) -> None:
    fed = federation(num_examples=(60, 60, 60), **SMALL)
    for position, (client_id, data) in enumerate(fed.data.items()):
        rows = torch.nonzero((data.train.y == position) | (data.train.y == 3)).flatten()
        object.__setattr__(fed.data[client_id], "train", data.train.subset(rows))
    fused = fed.fuse(fusefl_of(local=LocalSGD(num_epochs=6, batch_size=16)))
    guess = predict(fused.model.module(), fed.test.x).argmax(1)
    assert (guess == fed.test.y).double().mean() > 0.9


# --- refusals and cuts


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_blocks": 0}, "num_blocks is 0\n  where: method.num_blocks\n  fix:   give at least 1"),
        (
            {"feature_dropout": 1.0},
            "feature_dropout is 1.0\n  where: method.feature_dropout\n  fix:   give a probability in [0, 1)",
        ),
        (
            {"feature_dropout": -0.5},
            "feature_dropout is -0.5\n  where: method.feature_dropout\n  fix:   give a probability in [0, 1)",
        ),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FuseFL(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize("points", [None, ("2",)])
def test_a_model_that_cannot_be_cut_so_finely_is_told_before_anybody_trains(
    federation: Any, points: tuple[str, ...] | None
) -> None:
    fed = federation("mlp", width=4, depth=3)
    with pytest.raises(ModelError) as caught:
        fed.fuse(fusefl_of(num_blocks=4, local=LocalSGD(num_epochs=4), points=points))
    assert str(caught.value) == (
        "the model cannot be cut into 4 blocks, at most into 3\n"
        "  where: num_blocks\n"
        "  fix:   use num_blocks: 3 or less, or a deeper model"
        if points is None
        else "1 points make 2 blocks, not 4\n  where: points\n  fix:   give 3 points"
    )
    assert fed.cohort.ledger.exchanges() == []


def test_fewer_epochs_than_blocks(federation: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        federation(**SMALL).fuse(fusefl_of(num_blocks=3))
    assert str(caught.value) == (
        "2 local epochs cannot be divided over 3 exchanges\n  where: method.local.num_epochs\n  fix:   give at least 3"
    )


def test_points_name_the_layers_after_which_to_cut(federation: Any) -> None:
    fed = federation(**SMALL)
    fed.fuse(fusefl_of(num_blocks=3, local=LocalSGD(num_epochs=3, batch_size=16), points=("2", "5")))
    layers = [sorted({name.split(".")[0] for name in fed.upload(f"block_{k}", IDS[0]).group("block")}) for k in (0, 1)]
    assert layers == [["0", "1"], ["3", "4"]]


def test_balance_moves_the_cut(federation: Any) -> None:
    counts = []
    for balance in ("parameters", "compute"):
        fed = federation(num_clients=1, input_shape=(1, 16, 16), norm="none", **SMALL)
        fed.fuse(fusefl_of(balance=balance, head=Head(kind="ensemble")))
        counts.append([len(fed.upload(f"block_{k}", IDS[0]).group("block")) for k in (0, 1)])
    # Weights of the four convolutions: 36, 144, 288, 576; positions: 256, 256, 64, 64. A weight and a bias each.
    assert counts == [[6, 2], [4, 4]]


def test_answers_are_shared_between_heads(federation: Any) -> None:
    fed = federation(**SMALL)
    fed.fuse(fusefl_of(head=Head(kind="ensemble")))
    fed.fuse(fusefl_of(head=Head(kind="average")))
    assert all(entry.from_journal for entry in fed.cohort.ledger.entries)
    fed.fuse(fusefl_of())
    fresh = [entry.exchange for entry in fed.cohort.ledger.entries if not entry.from_journal]
    assert fresh == ["moments"] * 3


def test_a_seed_of_its_own_for_each_client_and_exchange(federation: Any) -> None:
    fed = federation(**SMALL)
    fed.fuse(fusefl_of())
    adaptors = [fed.upload("block_1", c).tensor("adaptor/mix.bias") for c in IDS]
    assert all(not torch.equal(a, b) for a, b in pairwise(adaptors))
    assert all(math.isfinite(float(a.float().sum())) for a in adaptors)
