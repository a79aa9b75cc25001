"""Predictions and scores, redone by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from fedfuse.core.examples import Examples
from fedfuse.training import evaluate, predict
from fedfuse.training.evaluation import score

LOGITS = torch.tensor([[math.log(3), 0.0, -1e9], [0.0, math.log(3), -1e9], [0.0, math.log(3), -1e9]])
LABELS = torch.tensor([0, 1, 0])


def test_a_score_by_hand() -> None:
    # Probabilities 3/4 and 1/4: two right at -log 3/4, one wrong at -log 1/4.
    found = score(LOGITS, LABELS)
    assert found.accuracy == pytest.approx(2 / 3)
    assert found.loss == pytest.approx((2 * math.log(4 / 3) + math.log(4)) / 3)
    assert found.confusion.tolist() == [[1, 1, 0], [0, 1, 0], [0, 0, 0]]
    assert isinstance(found.accuracy, float)
    assert isinstance(found.loss, float)


def test_the_diagonal_of_the_confusion_is_the_accuracy() -> None:
    g = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(100, 5, generator=g), torch.randint(0, 5, (100,), generator=g)
    found = score(logits, labels)
    assert int(found.confusion.sum()) == 100
    assert int(found.confusion.diagonal().sum()) / 100 == pytest.approx(found.accuracy)
    assert found.confusion.sum(1).tolist() == torch.bincount(labels, minlength=5).tolist()


def test_evaluating_is_predicting_and_scoring() -> None:
    found = evaluate(nn.Identity(), Examples(LOGITS, LABELS))
    wanted = score(LOGITS, LABELS)
    assert (found.accuracy, found.loss) == (wanted.accuracy, wanted.loss)
    assert found.confusion.equal(wanted.confusion)


def test_predictions_do_not_depend_on_the_batches() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    module(torch.randn(8, 3))
    x = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))
    whole = predict(module, x)
    assert whole.shape == (7, 4)
    for batch_size in (1, 2, 7):
        torch.testing.assert_close(predict(module, x, batch_size=batch_size), whole, rtol=1e-6, atol=1e-6)


def test_a_module_predicts_in_evaluation_mode_and_learns_nothing_from_it() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.9)).train()
    x = 5 + torch.randn(6, 3)
    assert predict(module, x).equal(predict(module, x))
    assert int(module[0].num_batches_tracked) == 0
    assert module[0].running_mean.tolist() == [0, 0, 0]


def test_images_of_several_channels_are_predicted_like_any_other() -> None:
    conv = nn.Conv2d(2, 3, 3)
    x = torch.randn(4, 2, 5, 5)
    torch.testing.assert_close(predict(conv, x), conv(x).detach(), rtol=1e-5, atol=1e-5)
    assert predict(nn.Flatten(), x).equal(x.flatten(1))


def test_functions_and_other_precisions_are_predicted_too() -> None:
    found = predict(lambda x: (2 * x).bfloat16(), torch.ones(3, 2))
    assert found.dtype == torch.float32
    assert found.tolist() == [[2, 2]] * 3


def test_no_inputs_give_no_predictions() -> None:
    assert predict(nn.Linear(3, 4), torch.zeros(0, 3)).shape == (0, 4)


def test_predictions_may_be_trained_on() -> None:
    # Features of a frozen net are the inputs of a head.
    features = predict(nn.Linear(3, 4), torch.randn(5, 3))
    assert not features.requires_grad
    head = nn.Linear(4, 2)
    head(features).sum().backward()
    assert head.weight.grad is not None


def test_predictions_own_their_memory() -> None:
    x = torch.ones(3, 2)
    predict(nn.Identity(), x).zero_()
    assert x.tolist() == [[1, 1]] * 3
