"""Random feature extractors, and classifiers on frozen features."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedfuse.core.artifact import Artifact, build, detached_state
from fedfuse.core.errors import ModelError
from fedfuse.models.headed import DiagonalGaussians, Headed
from fedfuse.models.random_features import RandomFeatures

IMAGE = (2, 8, 8)


def make(kind: str, num_features: int = 40, seed: int = 5, **settings: int) -> RandomFeatures:
    return RandomFeatures(kind, input_shape=IMAGE, num_features=num_features, seed=seed, **settings)


@pytest.mark.parametrize("kind", ["pixels", "relu", "fourier", "patches"])
def test_the_recipe_and_the_seed_rebuild_it(kind: str) -> None:
    features = make(kind)
    x = torch.randn(3, *IMAGE)
    assert features(x).shape == (3, features.width)
    again = build(features.recipe)
    assert torch.equal(again(x), features(x))
    if kind != "pixels":
        assert not torch.equal(make(kind, seed=6)(x), features(x))


def test_pixels_are_the_input() -> None:
    x = torch.randn(3, *IMAGE)
    assert torch.equal(make("pixels")(x), x.flatten(1))


def test_relu_and_fourier_in_closed_form() -> None:
    x = torch.randn(3, *IMAGE)
    for kind, function in (("relu", torch.relu), ("fourier", torch.cos)):
        features = make(kind)
        torch.testing.assert_close(features(x), function(x.flatten(1) @ features.weight.T + features.bias))


def test_fourier_features_approximate_a_gaussian_kernel() -> None:
    # E[2 cos(w x + b) cos(w y + b)] = exp(-|x - y|^2 bandwidth^2 / (2 d))
    features = make("fourier", num_features=20000)
    x, y = torch.randn(1, *IMAGE), torch.randn(1, *IMAGE)
    kernel = 2 * float((features(x) * features(y)).mean())
    assert kernel == pytest.approx(math.exp(-float((x - y).square().sum()) / (2 * 128)), abs=0.03)


def test_patches_have_whole_filters_without_a_mean_and_see_cells() -> None:
    features = make("patches", num_features=40)
    assert features.width == 32
    assert features.weight.shape == (2, 2, 5, 5)
    torch.testing.assert_close(features.weight.mean((2, 3)), torch.zeros(2, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(features.weight.flatten(1).norm(dim=1), torch.ones(2))
    x = torch.zeros(1, *IMAGE)
    x[0, :, 0, 0] = 1.0
    cells = features(x).unflatten(1, (2, 4, 4))
    assert cells[0, :, 2:, 2:].abs().max() == 0
    assert cells.abs().max() > 0
    assert make("patches", num_features=3, grid_size=20).width == 64


def test_what_cannot_be_made_is_refused() -> None:
    with pytest.raises(ModelError) as caught:
        make("wavelets")
    assert str(caught.value) == ('there are no features "wavelets"\n  fix:   use one of pixels, relu, fourier, patches')
    with pytest.raises(ModelError) as caught:
        RandomFeatures("patches", input_shape=(7,), num_features=4, seed=0)
    assert str(caught.value) == (
        "patches are cut from images, not from inputs of shape (7,)\n  fix:   use relu or fourier"
    )


def test_diagonal_gaussians_are_log_likelihoods() -> None:
    head = DiagonalGaussians(2, 2)
    head.center.copy_(torch.tensor([100.0, 50.0]))
    head.means.copy_(torch.tensor([[100.0, 51.0], [98.0, 50.0]]))
    head.precisions.copy_(torch.tensor([[1.0, 4.0], [0.25, 1.0]]))
    head.log_priors.copy_(torch.tensor([0.25, 0.75]).log())
    x = torch.tensor([[101.0, 50.0], [99.0, 53.0]])
    joint = torch.stack(
        [
            torch.distributions.Normal(m, p.rsqrt()).log_prob(x).sum(1) + prior
            for m, p, prior in zip(head.means, head.precisions, head.log_priors, strict=True)
        ],
        1,
    )
    torch.testing.assert_close(head(x) - head(x)[:, :1], joint - joint[:, :1])


@pytest.mark.parametrize("head", [nn.Linear(40, 3), DiagonalGaussians(40, 3)])
def test_a_classifier_survives_its_artifact(head: nn.Linear | DiagonalGaussians, tmp_path: object) -> None:
    features = make("relu")
    net = Headed(features, head, recipe=features.recipe)
    artifact = Artifact(net.recipe, detached_state(net))
    x = torch.randn(4, *IMAGE)
    again = Artifact.read(artifact.save(str(tmp_path) + "/artifact")).module()
    assert torch.equal(again(x), net(x))
    # The weights travel with the artifact: a later torch may draw others from the seed.
    assert "features.weight" in artifact.state


def test_an_unknown_head_is_refused() -> None:
    recipe = {"kind": "headed", "head": "os.system", "features": {}, "num_features": 1, "num_classes": 1}
    with pytest.raises(ModelError, match="there is no head"):
        build(recipe)
