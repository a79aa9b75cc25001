"""A generator finds what the ensemble knows and the student does not."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedfuse.core.errors import ConfigError
from fedfuse.methods.dense import Dense
from fedfuse.ops.distillation import disagreement, kd_divergence
from fedfuse.training import LocalSGD
from fedfuse.training.distillation import Distillation
from fedfuse.training.synthesis import Draft, Studio, Synthesis

LOCAL = LocalSGD(num_epochs=8, batch_size=16, learning_rate=0.05)


def small(**others: Any) -> Dense:
    settings: dict[str, Any] = {
        "local": LOCAL,
        "synthesis": Synthesis(num_epochs=8, num_steps=10, batch_size=32, latent_size=16, width=8),
        "distillation": Distillation(batch_size=32, learning_rate=0.05, kd_temperature=4.0),
    }
    return Dense(**{**settings, **others})


def test_the_objective_is_the_sum_of_its_three_terms(federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # By hand, on the drafts that the method really judged: cross-entropy + 0.5 L_BN - 2 mean(1[differ] KL_3).
    judged: list[tuple[Draft, float, float]] = []
    original = Studio.make

    def make(self: Studio, objective: Any, **others: Any) -> Any:
        def watched(draft: Draft) -> torch.Tensor:
            found: torch.Tensor = objective(draft)
            known = draft.logits.mean(0)
            labels = torch.nn.functional.one_hot(draft.labels, 4)
            loss = -(labels * known.log_softmax(1)).sum(1).mean() + 0.5 * draft.distance
            guess = self.learner.student(draft.x)
            gap = disagreement(guess, known) * kd_divergence(guess, known, 3.0)
            judged.append((draft, found.item(), (loss - 2 * gap.mean()).item()))
            return found

        return original(self, watched, **others)

    monkeypatch.setattr(Studio, "make", make)
    brief = Synthesis(num_epochs=2, num_steps=3, batch_size=8, latent_size=8, width=4)
    method = small(synthesis=brief, batchnorm_weight=0.5, adversarial_weight=2.0, adversarial_temperature=3.0)
    federation(width=4, depth=2).fuse(method)
    assert len(judged) == 6
    for draft, found, wanted in judged:
        assert draft.distance > 0
        assert found == pytest.approx(wanted, rel=1e-4)


def test_the_student_learns_what_the_ensemble_knows(federation: Any) -> None:
    fed = federation("mlp", width=32, depth=1)
    student = fed.fuse(small()).model.module()
    accuracy = (student(fed.test.x).argmax(1) == fed.test.y).float().mean()
    fresh = (fed.spec.build().eval()(fed.test.x).argmax(1) == fed.test.y).float().mean()
    assert accuracy > max(0.6, fresh)


def test_the_defaults_are_the_published_ones() -> None:
    method = Dense()
    assert (method.distillation.kd_temperature, method.distillation.learning_rate) == (20.0, 0.005)
    assert (method.synthesis.num_steps, method.synthesis.batch_size, method.synthesis.learning_rate) == (30, 256, 1e-3)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        Dense(adversarial_weight=-1.0)
    assert str(caught.value) == (
        "adversarial_weight is -1.0\n  where: method.adversarial_weight\n  fix:   give 0 or more"
    )
    with pytest.raises(ConfigError, match=r"adversarial_temperature is 0\.0"):
        Dense(adversarial_temperature=0.0)
    with pytest.raises(ConfigError, match="batchnorm_weight is nan"):
        Dense(batchnorm_weight=float("nan"))
