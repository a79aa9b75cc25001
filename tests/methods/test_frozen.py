"""The features that clients have in common, and heads that are trained on them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedfuse.core.artifact import Artifact
from fedfuse.core.errors import ConfigError
from fedfuse.methods.afl import AFL
from fedfuse.methods.frozen import Backbone, trained_head
from fedfuse.methods.lda import LDA
from fedfuse.models.blocks import cut_spec
from fedfuse.training import LocalSGD, predict


@pytest.mark.parametrize(("shape", "chosen"), [((1, 8, 8), "patches"), ((6,), "relu")])
def test_auto_takes_patches_for_images_and_relu_for_others(
    federation: Any, shape: tuple[int, ...], chosen: str
) -> None:
    fed = federation("mlp", width=4, depth=2, input_shape=shape)
    fed.fuse(AFL(backbone=Backbone(num_features=32)))
    assert fed.message("gram", "client_0").text("backbone/kind") == chosen
    assert fed.job.facts["backbone"] == chosen


def test_auto_takes_the_model_where_it_brings_weights(federation: Any, x: Tensor, tmp_path: Any) -> None:
    fed = federation(width=4, depth=2)
    module = fed.spec.build()
    spec = replace(fed.spec, initial={name: t.detach() * 1.5 for name, t in module.state_dict().items()})
    sides = {c: replace(side, model=spec) for c, side in fed.runtime.inner._sides.items()}
    fed.runtime.inner._sides, fed.job = sides, replace(fed.job, model=spec)
    fused = fed.fuse(LDA(shrinkage=0.2))
    assert fed.message("moments", "client_0").text("backbone/kind") == "model"
    pieces = cut_spec(spec, 1)
    features = predict(pieces.copy().blocks[0], x)
    artifact = Artifact.read(fused.model.save(tmp_path / "artifact"))
    rebuilt = artifact.module()
    torch.testing.assert_close(predict(rebuilt.features, x), features)
    assert artifact.recipe["num_features"] == pieces.head.in_features


def test_every_client_draws_the_same_features_from_a_short_message(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    backbone = Backbone(kind="relu", num_features=16)
    fed.fuse(AFL(backbone=backbone))
    messages = [fed.message("gram", c) for c in fed.cohort.client_ids]
    assert len({m.digest() for m in messages}) == 1
    assert len(messages[0].encode()) < 200
    first, second = (backbone.build(fed.spec, m).module for m in messages[:2])
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


def test_clients_with_different_models_share_random_features(federation: Any, x: Tensor) -> None:
    own = {"client_1": ("mlp", {"width": 5, "depth": 2})}
    fed = federation(client_models=own, width=4, depth=2)
    assert predict(fed.fuse(AFL(backbone=Backbone(num_features=32))).model.module(), x).shape == (20, 4)
    with pytest.raises(ConfigError) as caught:
        fed.fuse(AFL(backbone=Backbone(kind="model")))
    assert str(caught.value) == (
        "clients with different models have no features in common\n"
        "  where: method.backbone.kind\n"
        "  fix:   use kind: auto, patches, relu, fourier or pixels"
    )
    assert fed.cohort.ledger.exchanges() == []


def test_patches_of_what_is_no_image_are_refused_before_anybody_works(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=2, input_shape=(6,))
    with pytest.raises(ConfigError) as caught:
        fed.fuse(AFL(backbone=Backbone(kind="patches")))
    assert str(caught.value) == (
        "patches are cut from images, not from inputs of shape (6,)\n"
        "  where: method.backbone.kind\n"
        "  fix:   use kind: relu or fourier"
    )
    assert fed.cohort.ledger.exchanges() == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_features": 0}, "num_features is 0\n  where: backbone.num_features\n  fix:   give at least 1"),
        ({"grid_size": 0}, "grid_size is 0\n  where: backbone.grid_size\n  fix:   give at least 1"),
        ({"patch_size": 4}, "patch_size is 4\n  where: backbone.patch_size\n  fix:   give an odd number"),
        ({"bandwidth": 0.0}, "bandwidth is 0.0\n  where: backbone.bandwidth\n  fix:   give a number above 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Backbone(**settings)
    assert str(caught.value) == message


def test_the_trained_head_does_not_mind_the_scale_of_the_features(federation: Any) -> None:
    job = federation(width=4, depth=2).job
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (200,), generator=draw)
    features = torch.randn(200, 3, generator=draw) + 3 * labels[:, None]
    settings = LocalSGD(num_epochs=5)
    plain = trained_head(features, labels, 4, settings, job)
    moved = features * torch.tensor([1000.0, 0.01, 1.0]) + torch.tensor([1e4, 0.0, -7.0])
    scaled = trained_head(moved, labels, 4, settings, job)
    wanted = plain(features)[:, :2]
    torch.testing.assert_close(scaled(moved)[:, :2], wanted, rtol=1e-2, atol=2e-2)
    assert (wanted.argmax(1) == labels).float().mean() > 0.95
    assert set(plain(features).argmax(1).tolist()) <= {0, 1}
    constant = trained_head(torch.ones(6, 3), torch.tensor([0, 0, 0, 0, 1, 1]), 4, settings, job)
    assert isinstance(constant, nn.Linear)
    assert constant.weight.abs().max() == 0
