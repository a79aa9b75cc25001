"""The clients' models stay whole under a trained gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedfuse.core.artifact import Artifact
from fedfuse.core.errors import ConfigError
from fedfuse.methods.intactofl import IntactOFL, _spread
from fedfuse.models.mixture import Mixture
from fedfuse.training import LocalSGD
from fedfuse.training.distillation import Distillation
from fedfuse.training.synthesis import Draft, Studio, Synthesis

LOCAL = LocalSGD(num_epochs=8, batch_size=16, learning_rate=0.05)


def small(**others: Any) -> IntactOFL:
    settings: dict[str, Any] = {
        "local": LOCAL,
        "synthesis": Synthesis(num_epochs=4, num_steps=5, batch_size=16, latent_size=8, width=4),
        "distillation": Distillation(batch_size=16, learning_rate=0.05),
    }
    return IntactOFL(**{**settings, **others})


def experts(fed: Any) -> list[torch.nn.Module]:
    ids = fed.cohort.client_ids
    return [Artifact.of(fed.job.model_of(c), fed.upload("local_models", c).group("model")).module() for c in ids]


def test_the_result_is_the_mixture_with_every_model_whole(federation: Any) -> None:
    fed = federation(width=4, depth=2, client_models={"client_1": ("mlp", {"width": 8, "depth": 1})})
    net = fed.fuse(small()).model.module()
    assert isinstance(net, Mixture)
    for expert, own in zip(net.experts, experts(fed), strict=True):
        for name, tensor in own.state_dict().items():
            assert torch.equal(tensor, expert.state_dict()[name]), name
    uniform = torch.stack([own(fed.test.x) for own in experts(fed)]).mean(0)
    assert not torch.allclose(net(fed.test.x), uniform, atol=1e-3)
    assert net.gate.linear.weight.abs().max() > 0


def test_the_lesson_is_the_sum_of_its_three_terms(federation: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    # Cross-entropy + 0.5 std + 2 * 16 KL(softmax(ensemble / 4) || softmax(mixture / 4)), with a gate by hand.
    judged: list[tuple[float, float]] = []
    original = Studio.teach

    def teach(self: Studio, *, lesson: Any, **others: Any) -> float:
        def watched(draft: Draft) -> torch.Tensor:
            found: torch.Tensor = lesson(draft)
            weights = self.learner.student(draft.x)
            mixture = sum(weights[:, k, None] * draft.logits[k] for k in range(3)) / 3
            p, q = (draft.logits.mean(0) / 4).softmax(1), (mixture / 4).softmax(1)
            wanted = -mixture.log_softmax(1)[torch.arange(len(draft.labels)), draft.labels].mean()
            wanted = wanted + 0.5 * weights.std() + 2 * 16 * (p * (p / q).log()).sum(1).mean()
            judged.append((found.item(), wanted.item()))
            return found

        return original(self, lesson=watched, **others)

    monkeypatch.setattr(Studio, "teach", teach)
    federation(width=4, depth=2).fuse(small(spread_weight=0.5, ensemble_weight=2.0))
    assert len(judged) == 1 + 2 + 3 + 4
    for found, wanted in judged:
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize(("top_fraction", "wanted"), [(1.0, 3), (0.5, 2), (1 / 3, 1), (0.01, 1)])
def test_a_fraction_of_the_models_counts(federation: Any, top_fraction: float, wanted: int) -> None:
    brief = Synthesis(num_epochs=1, num_steps=1, batch_size=4, latent_size=4, width=2)
    fed = federation("mlp", width=4, depth=1)
    net = fed.fuse(small(top_fraction=top_fraction, synthesis=brief)).model.module()
    assert net.gate.top_k == wanted
    assert ((net.gate(fed.test.x) != 0).sum(1) <= wanted).all()


def test_the_mixture_is_at_least_nearly_as_good_as_the_ensemble(federation: Any) -> None:
    fed = federation("mlp", width=32, depth=1)
    net = fed.fuse(small()).model.module()
    uniform = torch.stack([own(fed.test.x) for own in experts(fed)]).mean(0)
    found, wanted = ((a.argmax(1) == fed.test.y).float().mean() for a in (net(fed.test.x), uniform))
    assert wanted > 0.8
    assert found > wanted - 0.1


def test_the_spread_of_equal_weights_has_a_gradient_of_0() -> None:
    weights = torch.ones(4, 3, requires_grad=True)
    _spread(weights).backward()
    assert weights.grad is not None
    assert weights.grad.abs().max() == 0
    torch.testing.assert_close(_spread(torch.tensor([1.0, 3.0])), torch.tensor(2.0).sqrt())


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        IntactOFL(top_fraction=0.0)
    assert str(caught.value) == ("top_fraction is 0.0\n  where: method.top_fraction\n  fix:   give a number in (0, 1]")
    with pytest.raises(ConfigError, match=r"ensemble_weight is -1\.0"):
        IntactOFL(ensemble_weight=-1.0)
