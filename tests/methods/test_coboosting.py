"""Hard inputs and the ensemble's weights."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fedfuse.core.artifact import Artifact
from fedfuse.core.errors import ConfigError, FedfuseError
from fedfuse.core.examples import InputSpace
from fedfuse.methods.coboosting import CoBoosting
from fedfuse.methods.distilling import weighted_ensemble
from fedfuse.ops.distillation import boosted_weights, kd_divergence
from fedfuse.training import LocalSGD
from fedfuse.training.distillation import Distillation
from fedfuse.training.synthesis import Draft, Studio, Synthesis
from fedfuse.training.teachers import Teachers

LOCAL = LocalSGD(num_epochs=8, batch_size=16, learning_rate=0.05)


def small(**others: Any) -> CoBoosting:
    settings: dict[str, Any] = {
        "local": LOCAL,
        "synthesis": Synthesis(num_epochs=8, num_steps=10, batch_size=32, latent_size=16, width=8),
        "distillation": Distillation(batch_size=32, learning_rate=0.05, kd_temperature=4.0),
    }
    return CoBoosting(**{**settings, **others})


def test_the_objective_by_hand(federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # (1 - p) cross-entropy - 2 KL_3 over all examples, with the weights that the ensemble has by now.
    judged: list[tuple[float, float]] = []
    original = Studio.make

    def make(self: Studio, objective: Any, **others: Any) -> Any:
        def watched(draft: Draft) -> torch.Tensor:
            found: torch.Tensor = objective(draft)
            known = torch.einsum("m,mnc->nc", self.weights / self.weights.sum(), draft.logits)
            logs = known.log_softmax(1)[torch.arange(8), draft.labels]
            gap = kd_divergence(self.learner.student(draft.x), known, 3.0)
            wanted = (-(1 - logs.exp()) * logs - 2 * gap).mean()
            judged.append((found.item(), wanted.item()))
            return found

        return original(self, watched, **others)

    monkeypatch.setattr(Studio, "make", make)
    brief = Synthesis(num_epochs=3, num_steps=2, batch_size=8, latent_size=8, width=4)
    federation(width=4, depth=2).fuse(small(synthesis=brief, adversarial_weight=2.0))
    assert len(judged) == 6
    for found, wanted in judged:
        assert found == pytest.approx(wanted, rel=1e-4)


def test_weights_move_from_the_second_epoch_on_over_the_older_pool(
    federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    swept: list[tuple[int, float]] = []

    def watched(weights: Any, start: Any, logits: Any, labels: Any, step_size: float) -> Any:
        swept.append((len(labels), step_size))
        assert logits.shape == (3, len(labels), 4)
        return boosted_weights(weights, start, logits, labels, step_size)

    monkeypatch.setattr("fedfuse.methods.coboosting.boosted_weights", watched)
    brief = Synthesis(num_epochs=3, num_steps=1, batch_size=8, latent_size=8, width=4)
    fed = federation(width=4, depth=2)
    fed.fuse(small(synthesis=brief, distillation=Distillation(batch_size=8)))
    # No sweep in epoch 0; then one step per batch of what the epochs before made.
    assert [size for size, _ in swept] == [8, 8, 8]
    assert [step for _, step in swept] == pytest.approx([0.01 * 0.99, 0.01 * 0.99**2, 0.01 * 0.99**2])
    shares = fed.job.facts["ensemble_weights"]
    assert len(shares) == 3
    assert sum(shares) == pytest.approx(1.0, abs=1e-5)


def test_without_a_step_the_weights_stay_equal(federation: Any) -> None:
    brief = Synthesis(num_epochs=3, num_steps=1, batch_size=8, latent_size=8, width=4)
    fed = federation(width=4, depth=2)
    fed.fuse(small(synthesis=brief, weight_step=0.0, perturbation=0.0))
    assert fed.job.facts["ensemble_weights"] == pytest.approx([1 / 3] * 3, abs=1e-6)


def test_the_ensemble_with_its_weights_may_be_the_result(federation: Any) -> None:
    fed = federation(width=4, depth=2, client_models={"client_1": ("mlp", {"width": 8, "depth": 1})})
    brief = Synthesis(num_epochs=3, num_steps=1, batch_size=8, latent_size=8, width=4)
    artifact = fed.fuse(small(synthesis=brief, weight_step=0.2, result="ensemble")).model
    shares = torch.tensor(fed.job.facts["ensemble_weights"])
    assert shares.max() > 1 / 3 + 0.01
    members = [
        Artifact.of(fed.job.model_of(c), fed.upload("local_models", c).group("model")).module()
        for c in ("client_0", "client_1", "client_2")
    ]
    wanted = sum(share * member(fed.test.x) for share, member in zip(shares, members, strict=True))
    torch.testing.assert_close(
        Artifact(artifact.recipe, artifact.state).module()(fed.test.x), wanted, rtol=1e-3, atol=1e-3
    )


def test_models_without_recipes_make_no_ensemble(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    with pytest.raises(FedfuseError) as caught:
        weighted_ensemble(Teachers([fed.spec.build()]), torch.ones(1), fed.job)
    assert str(caught.value) == (
        "these models have no recipes: they cannot be put into a file\n  where: method.result\n"
        "  fix:   use result: student"
    )


def test_the_student_learns_what_the_ensemble_knows(federation: Any) -> None:
    fed = federation("mlp", width=32, depth=1)
    student = fed.fuse(small()).model.module()
    accuracy = (student(fed.test.x).argmax(1) == fed.test.y).float().mean()
    assert accuracy > 0.6


def test_the_lesson_is_on_harder_inputs(federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[float] = []
    original = Studio.harder

    def watched(self: Studio, x: Any, draw: Any, step_size: float) -> Any:
        found = original(self, x, draw, step_size)
        moved.append((self.inputs.restore(found) - self.inputs.restore(x)).abs().max().item())
        return found

    monkeypatch.setattr(Studio, "harder", watched)
    fed = federation(width=4, depth=2)
    fed.job = dataclasses.replace(fed.job, inputs=InputSpace((0.5,), (0.25,), True))
    fed.fuse(small(synthesis=Synthesis(num_epochs=2, num_steps=1, batch_size=8, latent_size=8, width=4)))
    assert moved == pytest.approx([8 / 255] * 2, abs=1e-5)


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        CoBoosting(weight_decay_per_epoch=0.0)
    assert str(caught.value) == (
        "weight_decay_per_epoch is 0.0\n  where: method.weight_decay_per_epoch\n  fix:   give a number in (0, 1]"
    )
    for name in ("hard_sample_power", "adversarial_weight", "weight_step", "perturbation"):
        with pytest.raises(ConfigError, match=f"{name} is -1.0"):
            CoBoosting(**{name: -1.0})  # type: ignore[arg-type]
