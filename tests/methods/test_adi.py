"""Inputs that are optimised themselves."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from fedfuse.core.errors import ConfigError
from fedfuse.methods.adi import ADI
from fedfuse.training import LocalSGD
from fedfuse.training.distillation import Distillation
from fedfuse.training.synthesis import Draft, Studio, Synthesis

LOCAL = LocalSGD(num_epochs=8, batch_size=16, learning_rate=0.05)


def small(**others: Any) -> ADI:
    settings: dict[str, Any] = {
        "local": LOCAL,
        "synthesis": Synthesis(num_epochs=6, num_steps=20, batch_size=32, learning_rate=0.05),
        "distillation": Distillation(batch_size=32, learning_rate=0.05),
    }
    return ADI(**{**settings, **others})


def by_hand(draft: Draft, guess: torch.Tensor) -> float:
    """Cross-entropy + 2 L_BN + 0.3 variation + 0.5 mean square - 4 JS_3."""
    known = draft.logits.mean(0)
    loss = -known.log_softmax(1)[torch.arange(8), draft.labels].mean() + 2 * draft.distance
    x = draft.x
    down, right = (x[:, :, 1:] - x[:, :, :-1]).abs().mean(), (x[..., 1:] - x[..., :-1]).abs().mean()
    p, q = (known / 3).softmax(1), (guess / 3).softmax(1)
    middle = (p + q) / 2
    js = 0.5 * (p * (p / middle).log() + q * (q / middle).log()).sum(1).mean()
    return (loss + 0.3 * (down + right) + 0.5 * x.square().mean() - 4 * js).item()


def test_the_objective_is_the_sum_of_its_five_terms(federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    judged: list[tuple[float, float]] = []
    original = Studio.make

    def make(self: Studio, objective: Any, **others: Any) -> Any:
        def watched(draft: Draft) -> torch.Tensor:
            found: torch.Tensor = objective(draft)
            judged.append((found.item(), by_hand(draft, self.learner.student(draft.x))))
            return found

        return original(self, watched, **others)

    monkeypatch.setattr(Studio, "make", make)
    weights = {"batchnorm_weight": 2.0, "variation_weight": 0.3, "square_weight": 0.5, "competition_weight": 4.0}
    brief = Synthesis(num_epochs=2, num_steps=3, batch_size=8, learning_rate=0.05)
    federation(width=4, depth=2).fuse(small(synthesis=brief, **weights))
    assert len(judged) == 6
    for found, wanted in judged:
        assert found == pytest.approx(wanted, rel=1e-4)


def test_inputs_come_to_be_what_was_wanted(federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # After optimisation the ensemble sees in each input the class that was asked for.
    made: list[tuple[torch.Tensor, torch.Tensor, Studio]] = []
    original = Studio.make

    def make(self: Studio, objective: Any, **others: Any) -> Any:
        found = original(self, objective, **others)
        made.append((*found, self))
        return found

    monkeypatch.setattr(Studio, "make", make)
    federation(width=8, depth=2).fuse(small(competition_weight=0.0))
    raw, labels, room = made[0]
    noise = torch.randn(raw.shape, generator=torch.Generator().manual_seed(1))
    answers = [room.teachers.answer(room.view(x)) for x in (noise, raw)]
    right = [(answer.argmax(1) == labels).float().mean().item() for answer in answers]
    assert right[1] > 0.6 > 2 * right[0]
    assert math.isfinite(raw.abs().max().item())


def test_the_student_learns_what_the_ensemble_knows(federation: Any) -> None:
    fed = federation("mlp", width=32, depth=1)
    student = fed.fuse(small()).model.module()
    accuracy = (student(fed.test.x).argmax(1) == fed.test.y).float().mean()
    assert accuracy > 0.5


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        ADI(competition_temperature=0.0)
    assert str(caught.value) == (
        "competition_temperature is 0.0\n  where: method.competition_temperature\n  fix:   give a number above 0"
    )
    with pytest.raises(ConfigError, match=r"variation_weight is -1\.0"):
        ADI(variation_weight=-1.0)
