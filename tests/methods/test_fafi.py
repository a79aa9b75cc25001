"""FAFI: the local loss by hand, the fusion, views of every kind of input, and evaluation that learns nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

import fedfuse
from fedfuse.core.artifact import Artifact, load_state
from fedfuse.core.errors import ConfigError
from fedfuse.methods.fafi import FAFI, first_prototypical, viewer
from fedfuse.ops.contrast import prototype_contrast, supervised_contrast
from fedfuse.training import LocalSGD, predict

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)


def trained(fed: Any, client_id: str) -> Any:
    module = first_prototypical(fed.job.model_of(client_id))
    load_state(module, fed.upload("prototypes", client_id).group("model"))
    return module.eval()


def test_one_step_in_closed_form(federation: Any) -> None:
    local = LocalSGD(num_epochs=1, batch_size=64, learning_rate=0.1, momentum=0.0)
    fed = federation("mlp", width=6, depth=1, num_clients=1)
    fed.fuse(FAFI(local=local, contrast_weight=0.5, contrast_temperature=0.2, prototype_weight=2.0))
    module, data, rng = first_prototypical(fed.spec), fed.data["client_0"].train, fed.rng("client_0", "prototypes")
    order = torch.randperm(len(data), generator=rng.torch("shuffle", 0))
    x, y = data.x[order], data.y[order].repeat(2)
    views = [x + 0.1 * torch.randn(x.shape, generator=rng.torch(name)) for name in ("first view", "second view")]
    features = module.features(torch.cat(views))
    loss = F.cross_entropy(features @ module.prototypes.T, y)
    loss = loss + 0.5 * supervised_contrast(features, y, 0.2) + 2.0 * prototype_contrast(module.prototypes)
    gradients = torch.autograd.grad(loss, list(module.parameters()))
    upload = fed.upload("prototypes", "client_0")
    for (name, p), gradient in zip(module.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(upload.tensor(f"model/{name}"), p.detach() - 0.1 * gradient, rtol=1e-4, atol=1e-5)


def test_the_fusion_by_hand(federation: Any, tmp_path: Path) -> None:
    fed = federation(width=4, depth=2)
    fused = fed.fuse(FAFI(local=SETTINGS, fusion="examples"))
    assert fed.cohort.ledger.exchanges() == ["prototypes"]
    modules = [trained(fed, c) for c in fed.cohort.client_ids]
    with torch.no_grad():
        joint = sum(n / 96 * m.features(fed.test.x) for n, m in zip((24, 32, 40), modules, strict=True))
        mean = torch.stack([m.prototypes for m in modules]).mean(0)
        wanted = F.normalize(joint) @ mean.T
    net = Artifact.read(fused.model.save(tmp_path)).module()
    torch.testing.assert_close(predict(net, fed.test.x), wanted, rtol=1e-4, atol=1e-5)


def test_informative_features_are_those_unlike_noise(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    net = fed.fuse(FAFI(local=SETTINGS)).model.module()
    modules = [trained(fed, c) for c in fed.cohort.client_ids]
    noise = torch.randn(256, 1, 8, 8, generator=fed.job.rng.torch("noise"))
    with torch.no_grad():
        joint = torch.zeros(60, 4)
        for module in modules:
            reference = F.normalize(module.features(noise).mean(0), dim=0)
            own = module.features(fed.test.x)
            joint += (1 - own @ reference)[:, None] * own / 3
        wanted = F.normalize(joint) @ torch.stack([m.prototypes for m in modules]).mean(0).T
    torch.testing.assert_close(predict(net, fed.test.x), wanted, rtol=1e-3, atol=1e-4)


def test_predicting_changes_nothing_and_does_not_depend_on_the_batch(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fused = fed.fuse(FAFI(local=SETTINGS))
    net = fused.model.module()
    before = {name: t.clone() for name, t in net.state_dict().items()}
    together = predict(net, fed.test.x)
    alone = torch.cat([predict(net, x[None]) for x in fed.test.x])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(t, before[name]) for name, t in net.state_dict().items())


def test_everyone_starts_from_the_same_prototypes(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    first, again = first_prototypical(fed.spec), first_prototypical(fed.spec)
    assert torch.equal(first.prototypes, again.prototypes)
    # The specification's own module is not touched by what is trained.
    with torch.no_grad():
        first.encoder(fed.test.x)
    assert all(
        torch.equal(a, b) for a, b in zip(again.parameters(), first_prototypical(fed.spec).parameters(), strict=True)
    )


def test_clients_of_different_widths_need_their_own_prototypes(federation: Any) -> None:
    others = {"client_1": ("cnn", {"width": 6, "depth": 2})}
    fed = federation(width=4, depth=2, client_models=others)
    with pytest.raises(ConfigError) as caught:
        fed.fuse(FAFI(local=SETTINGS))
    assert str(caught.value) == (
        "prototypes of different widths cannot be averaged\n"
        "  where: method.prototypes\n"
        "  fix:   use prototypes: own for clients with different models"
    )
    assert fed.cohort.ledger.exchanges() == []
    fused = fed.fuse(FAFI(local=SETTINGS, prototypes="own", fusion="examples"))
    with torch.no_grad():
        wanted = sum(
            n / 96 * trained(fed, c)(fed.test.x) for n, c in zip((24, 32, 40), fed.cohort.client_ids, strict=True)
        )
    torch.testing.assert_close(predict(fused.model.module(), fed.test.x), wanted, rtol=1e-4, atol=1e-5)


def test_a_client_with_one_example_and_one_that_is_away(federation: Any) -> None:
    fed = federation(width=4, depth=2, num_examples=(1, 24, 24), absent={("prototypes", "client_2")}, quorum=0.6)
    net = fed.fuse(FAFI(local=SETTINGS)).model.module()
    assert len(net.encoders) == 2
    assert bool(torch.isfinite(predict(net, fed.test.x)).all())


@pytest.mark.parametrize(
    ("shape", "augment", "changes_values"),
    [
        ((4, 7), "none", True),
        ((4, 1, 8, 8), "none", True),
        ((4, 3, 32, 32), "none", False),
        ((4, 3, 8, 8), "flip", False),
    ],
)
def test_auto_views_fit_the_inputs_and_each_example_has_its_own(
    shape: tuple[int, ...], augment: str, changes_values: bool
) -> None:
    x = torch.rand(1, *shape[1:]).expand(32, *shape[1:]).contiguous() + 1
    view = viewer("auto", augment, x, 0.1)
    seen = view(x, torch.Generator().manual_seed(0))
    assert seen.shape == x.shape
    assert len({tuple(example.flatten().tolist()) for example in seen}) > 1
    known = {0.0, *x[0].flatten().tolist()}
    assert (not set(seen.flatten().tolist()) <= known) is changes_values


def test_inputs_that_cannot_take_noise_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        viewer("auto", "none", torch.zeros(2, 5, dtype=torch.int64), 0.1)
    assert str(caught.value) == (
        "inputs of dtype torch.int64 cannot take noise\n"
        "  where: method.views\n"
        "  fix:   use a method that needs no views, such as ensemble"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"contrast_temperature": 0.0},
            "contrast_temperature is 0.0\n  where: method.contrast_temperature\n  fix:   give a number above 0",
        ),
        (
            {"contrast_weight": -1.0},
            "contrast_weight is -1.0\n  where: method.contrast_weight\n  fix:   give 0 or more",
        ),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FAFI(**settings)  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_it_learns_digits() -> None:
    config: dict[str, Any] = {
        "data": {"source": "digits", "limit": 400, "test_limit": 200, "partition": {"scheme": "iid", "num_clients": 3}},
        "model": {"family": "mlp", "width": 32, "depth": 1},
        "runtime": {"name": "local", "workers": 1},
    }
    local = {"num_epochs": 8, "batch_size": 16, "learning_rate": 0.05}
    result = fedfuse.run({**config, "method": {"name": "fafi", "local": local}})
    assert result.accuracy is not None
    assert result.accuracy > 0.8
