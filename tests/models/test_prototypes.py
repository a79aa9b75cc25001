"""Classifiers by likeness to prototypes, by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fedfuse.core.artifact import build, detached_state, load_state
from fedfuse.core.errors import ModelError
from fedfuse.models import spec
from fedfuse.models.blocks import cut_spec
from fedfuse.models.prototypes import PrototypeEnsemble, Prototypical

X = torch.tensor([[3.0, 4.0]])


def linear(*rows: list[float]) -> nn.Module:
    layer = nn.Linear(2, len(rows), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(rows))
    return layer


SAME = linear([1.0, 0.0], [0.0, 1.0])
FIRST_ONLY = linear([100.0, 0.0], [0.0, 0.0])


def test_features_are_unit_and_prototypes_are_not() -> None:
    net = Prototypical(SAME, torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    torch.testing.assert_close(net.features(X), torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(net(X), torch.tensor([[0.6, 1.6]]))


def test_one_set_of_prototypes_meets_the_sum_of_unit_features() -> None:
    # (0.6, 0.8) and (1, 0), a quarter and three quarters: (0.9, 0.2), however long the second encoder's features are.
    net = PrototypeEnsemble([SAME, FIRST_ONLY], [torch.eye(2)], torch.tensor([0.25, 0.75]))
    torch.testing.assert_close(net(X), torch.tensor([[0.9, 0.2]]) / (0.81 + 0.04) ** 0.5)


def test_own_prototypes_meet_their_own_features_of_any_width() -> None:
    wide = linear([1.0, 0.0], [0.0, 1.0], [0.0, 0.0])
    own = [torch.eye(2), torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])]
    net = PrototypeEnsemble([SAME, wide], own, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(net(X), torch.tensor([[0.5 * 0.6 + 0.5 * 0.8, 0.5 * 0.8 + 0.0]]))


def test_a_feature_as_for_noise_counts_for_nothing() -> None:
    references = [torch.tensor([0.6, 0.8]), torch.tensor([0.0, 1.0])]
    net = PrototypeEnsemble([SAME, FIRST_ONLY], [torch.eye(2)], torch.tensor([0.5, 0.5]), references=references)
    torch.testing.assert_close(net(X), torch.tensor([[1.0, 0.0]]), atol=1e-6, rtol=0)


def test_sets_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelError) as caught:
        PrototypeEnsemble([SAME] * 3, [torch.eye(2)] * 2, torch.ones(3))
    assert str(caught.value) == (
        "3 encoders came with 2 sets of prototypes and 0 references\n"
        "  fix:   give one set, or one per encoder, and a reference for none or for each"
    )


@pytest.mark.parametrize("num_sets", [1, 2])
def test_the_recipe_rebuilds_it(num_sets: int) -> None:
    model = spec("mlp", {"width": 4, "depth": 2}, input_shape=(5,), num_classes=3, seed=1)
    pieces = [cut_spec(model, 1).copy() for _ in range(2)]
    d = pieces[0].head.in_features
    net = PrototypeEnsemble(
        [p.blocks[0] for p in pieces],
        [torch.randn(3, d) for _ in range(num_sets)],
        torch.tensor([0.4, 0.6]),
        references=[nn.functional.normalize(torch.randn(d), dim=0) for _ in range(2)],
        recipes=[p.recipes[0] for p in pieces],
    ).eval()
    rebuilt = build(net.recipe).eval()
    load_state(rebuilt, detached_state(net))
    x = torch.randn(6, 5)
    assert torch.equal(rebuilt(x), net(x))
    assert net(x).shape == (6, 3)
