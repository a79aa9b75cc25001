"""A generator and a student that learn at the same time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fedfuse.core.errors import ConfigError
from fedfuse.methods.dafl import DAFL, NO_FEATURES
from fedfuse.training import LocalSGD
from fedfuse.training.distillation import Distillation, Learner
from fedfuse.training.synthesis import Synthesis
from fedfuse.training.teachers import Teachers

LOCAL = LocalSGD(num_epochs=8, batch_size=16, learning_rate=0.05)


def small(**others: Any) -> DAFL:
    settings: dict[str, Any] = {
        "local": LOCAL,
        "synthesis": Synthesis(num_epochs=4, num_steps=25, batch_size=32, latent_size=16, width=8),
        "distillation": Distillation(learning_rate=0.1, kd_temperature=1.0),
    }
    return DAFL(**{**settings, **others})


def test_the_objective_is_the_sum_of_its_three_terms(federation: Any) -> None:
    # Answers (2, 0) and (0, 2): certain of both classes in equal parts; features 1, 3 and -2, 0 have mean size 1.5.
    known = torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    features = [torch.tensor([[1.0, 3.0], [-2.0, 0.0]]), None]
    method, job = DAFL(one_hot_weight=2.0, activation_weight=0.5, information_weight=3.0), federation(width=4).job
    one_hot = torch.tensor(1 + torch.e**-2).log()
    wanted = 2 * one_hot - 0.5 * 1.5 - 3 * torch.tensor(2.0).log()
    torch.testing.assert_close(method._objective(known, features, job), wanted)
    assert "notes" not in job.facts


def test_models_without_a_linear_layer_are_said(federation: Any) -> None:
    job = federation(width=4).job
    DAFL()._objective(torch.zeros(2, 3), [None], job)
    assert job.facts["notes"] == [NO_FEATURES]


def test_every_batch_is_new_and_the_generator_goes_on(federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[torch.Tensor] = []
    targets: list[torch.Tensor] = []
    original = Learner.step

    def step(self: Learner, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        assert not x.requires_grad
        assert not target.requires_grad
        batches.append(x)
        targets.append(target)
        return original(self, x, target)

    monkeypatch.setattr(Learner, "step", step)
    brief = Synthesis(num_epochs=2, num_steps=3, batch_size=8, latent_size=8, width=4)
    fed = federation(width=4, depth=2)
    fed.fuse(small(synthesis=brief))
    assert len(batches) == 6
    assert len({tuple(batch.flatten().tolist()) for batch in batches}) == 6


def test_the_generator_finds_all_classes_and_the_student_learns_them(federation: Any) -> None:
    fed = federation("mlp", width=32, depth=1)
    student = fed.fuse(small()).model.module()
    accuracy = (student(fed.test.x).argmax(1) == fed.test.y).float().mean()
    assert accuracy > 0.5


def test_the_penultimate_features_are_those_of_every_model(federation: Any) -> None:
    models = [federation(width=width, depth=2).spec.build() for width in (4, 8)]
    teachers = Teachers(models)
    x = torch.randn(3, 1, 8, 8)
    with teachers.penultimate() as seen:
        logits = teachers.logits(x)
    for position, model in enumerate(models):
        last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
        assert seen[position] is not None
        torch.testing.assert_close(last(seen[position]), logits[position])


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        DAFL(information_weight=-5.0)
    assert str(caught.value) == (
        "information_weight is -5.0\n  where: method.information_weight\n  fix:   give 0 or more"
    )
