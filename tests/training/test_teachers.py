"""The clients' models, asked all together."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from fedfuse.core.errors import ModelError
from fedfuse.models import spec
from fedfuse.training.teachers import Teachers


def linear(weight: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(weight[0]), len(weight), bias=False)
    layer.weight.data = torch.tensor(weight)
    return layer


def normed(mean: float, var: float) -> nn.Module:
    """A BatchNorm layer that remembers these statistics, then a linear layer."""
    norm = nn.BatchNorm2d(1)
    norm.running_mean.fill_(mean)  # type: ignore[union-attr]
    norm.running_var.fill_(var)  # type: ignore[union-attr]
    return nn.Sequential(norm, nn.Flatten(), nn.Linear(4, 2))


def batch(mean: float, spread: float) -> Tensor:
    """Values mean - spread and mean + spread in equal parts: that mean, and the variance spread squared."""
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0]).view(1, 1, 2, 2)
    return mean + spread * signs.expand(3, 1, 2, 2)


def test_models_are_frozen_and_in_evaluation_mode() -> None:
    model = spec("cnn", {"width": 4}, input_shape=(1, 8, 8), num_classes=3, seed=1).build().train()
    teachers = Teachers([model])
    before = copy.deepcopy(model.state_dict())
    x = torch.randn(4, 1, 8, 8, requires_grad=True)
    teachers.answer(x).sum().backward()
    assert x.grad is not None
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_common_answer_is_the_weighted_mean_of_logits() -> None:
    models = [linear([[1.0], [0.0]]), linear([[0.0], [4.0]])]
    x = torch.tensor([[1.0]])
    assert Teachers(models).answer(x).tolist() == [[0.5, 2.0]]
    weighted = Teachers(models, weights=torch.tensor([3.0, 1.0]))
    assert weighted.answer(x).tolist() == [[0.75, 1.0]]
    assert weighted.answer(x, torch.tensor([0.0, 0.5])).tolist() == [[0.0, 4.0]]
    assert weighted.logits(x).shape == (2, 1, 2)


def test_nobody_to_learn_from_is_refused() -> None:
    with pytest.raises(ModelError) as caught:
        Teachers([])
    assert str(caught.value) == "there is nobody to learn from\n  fix:   give at least one model"


def test_the_digest_is_that_of_all_weights() -> None:
    def digest(*values: float) -> str:
        return Teachers([linear([[value]]) for value in values]).digest

    assert digest(1.0, 2.0) == digest(1.0, 2.0)
    assert len({digest(1.0, 2.0), digest(2.0, 1.0), digest(1.0), digest(1.0, 2.5)}) == 4


def test_the_distance_is_0_where_statistics_agree() -> None:
    teachers = Teachers([normed(3.0, 4.0)])
    with teachers.watched() as statistics:
        teachers.logits(batch(3.0, 2.0))
    assert statistics.distance().item() == pytest.approx(0.0, abs=1e-6)


def test_the_distance_is_summed_over_layers_and_averaged_over_models() -> None:
    # Batch mean 1 and variance 4. First model: |1 - 0| + |4 - 1| = 4. Second: |1 - 3| + |4 - 9| = 7. Third: no layer.
    plain = nn.Sequential(nn.Flatten(), nn.Linear(4, 2))
    x = batch(1.0, 2.0)
    for models, wanted in (
        ([normed(0.0, 1.0)], 4.0),
        ([normed(0.0, 1.0), normed(3.0, 9.0)], 5.5),
        ([normed(0.0, 1.0), plain], 2.0),
    ):
        teachers = Teachers(models)
        assert teachers.has_batchnorm
        with teachers.watched() as statistics:
            teachers.logits(x)
        assert statistics.distance().item() == pytest.approx(wanted, abs=1e-5)
    # Two layers of one model; what leaves the first has mean 1 and variance 4 again: 4 + |1 - 3| + |4 - 9|.
    two = nn.Sequential(normed(0.0, 1.0)[0], normed(3.0, 9.0))  # type: ignore[index]
    teachers = Teachers([two])
    with teachers.watched() as statistics:
        teachers.logits(x)
    assert statistics.distance().item() == pytest.approx(11.0, abs=1e-4)


def test_every_pass_is_judged_on_its_own_and_the_hooks_go() -> None:
    teachers = Teachers([normed(0.0, 1.0)])
    with teachers.watched() as statistics:
        teachers.logits(batch(0.0, 1.0))
        assert statistics.distance().item() == pytest.approx(0.0, abs=1e-6)
        teachers.logits(batch(1.0, 1.0))
        assert statistics.distance().item() == pytest.approx(1.0, abs=1e-6)
        assert statistics.distance().item() == 0.0
    teachers.logits(batch(1.0, 1.0))
    assert statistics.distance().item() == 0.0


def test_the_distance_pulls_inputs_towards_the_statistics() -> None:
    teachers = Teachers([normed(3.0, 4.0), normed(3.0, 4.0)])
    x = batch(0.0, 1.0).clone().requires_grad_()
    optimizer = torch.optim.SGD([x], lr=0.3)
    for _ in range(200):
        with teachers.watched() as statistics:
            teachers.logits(x)
        optimizer.zero_grad()
        statistics.distance().backward()
        optimizer.step()
    assert x.mean().item() == pytest.approx(3.0, abs=0.2)
    assert x.var().item() == pytest.approx(4.0, abs=0.6)


@pytest.mark.parametrize("norm", ["group", "none"])
def test_models_without_statistics_have_no_distance(norm: str) -> None:
    model = spec("cnn", {"width": 4, "norm": norm}, input_shape=(1, 8, 8), num_classes=3, seed=1).build()
    teachers = Teachers([model])
    assert not teachers.has_batchnorm
    with teachers.watched() as statistics:
        teachers.logits(torch.randn(4, 1, 8, 8))
    assert statistics.distance().item() == 0.0


def test_what_enters_the_last_linear_layer_is_seen() -> None:
    two = nn.Sequential(linear([[2.0]]), nn.ReLU(), linear([[1.0], [3.0]]))
    convolution = nn.Sequential(nn.Unflatten(1, (1, 1)), nn.Conv1d(1, 2, 1), nn.Flatten())
    teachers = Teachers([two, convolution])
    with teachers.penultimate() as seen:
        teachers.logits(torch.tensor([[1.5]]))
        assert seen[0] is not None
        assert seen[0].tolist() == [[3.0]]
        assert seen[1] is None
    teachers.logits(torch.tensor([[9.0]]))
    assert seen[0].tolist() == [[3.0]]
