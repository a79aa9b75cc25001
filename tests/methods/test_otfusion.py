"""Alignment by optimal transport, then the mean."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import fedfuse
from fedfuse.core.errors import ConfigError, ModelError
from fedfuse.core.examples import Examples
from fedfuse.methods.fedavg import FedAvg
from fedfuse.methods.otfusion import OTFusion, align
from fedfuse.models import spec
from fedfuse.models.permuting import channel_outputs, channels_of, permute
from fedfuse.training import LocalSGD

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)
FAMILIES = [
    ("mlp", {"width": 12, "depth": 3}),
    ("cnn", {"width": 8, "depth": 4, "norm": "batch"}),
    ("cnn", {"width": 16, "depth": 2, "norm": "group"}),
    ("resnet", {"width": 4, "depth": 18}),
]


def noisy(state: dict[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: t + 0.1 * torch.rand(t.shape, generator=generator) if t.is_floating_point() else t for n, t in state.items()
    }


def scrambled(state: dict[str, Tensor], channels: Any) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    for group in channels.groups:
        per_block = group.size // group.num_blocks
        starts = torch.randperm(group.num_blocks, generator=generator) * per_block
        order = torch.cat([start + torch.randperm(per_block, generator=generator) for start in starts])
        state = permute(state, group, order)
    return state


@pytest.mark.parametrize("by", ["weights", "activations"])
@pytest.mark.parametrize(("family", "settings"), FAMILIES)
def test_a_permuted_copy_is_put_back_exactly(family: str, settings: dict[str, Any], by: str) -> None:
    model = spec(family, settings, input_shape=(3, 8, 8), num_classes=4, seed=2)
    channels, state = channels_of(model), noisy(model.build().state_dict())
    copy = scrambled(state, channels)
    answers: list[list[Tensor]] = [[], []]
    if by == "activations":
        x = torch.rand(16, 3, 8, 8, generator=torch.Generator().manual_seed(3))
        for k, weights in enumerate((copy, state)):
            module = model.build()
            module.load_state_dict(weights)
            answers[k] = channel_outputs(module, channels, x)
    found = align(copy, state, channels, *answers)
    assert any(not torch.equal(copy[name], tensor) for name, tensor in state.items())
    for name, tensor in state.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_a_wider_copy_with_split_channels_is_merged_back_exactly() -> None:
    narrow, wide = (spec("mlp", {"width": w, "depth": 2}, input_shape=(6,), num_classes=3, seed=2) for w in (3, 6))
    state, split = narrow.build().state_dict(), wide.build().state_dict()
    for name, tensor in state.items():
        layer, kind = name.split(".")
        rows = tensor if layer == "5" else tensor.repeat_interleave(2, 0)
        split[name] = rows.repeat_interleave(2, 1) / 2 if kind == "weight" and layer != "1" else rows
    assert all(split[name].shape == tensor.shape for name, tensor in wide.build().state_dict().items())
    found = align(split, state, channels_of(narrow))
    for name, tensor in state.items():
        torch.testing.assert_close(found[name], tensor)


def test_the_mean_of_what_is_aligned_is_weighted_by_examples(federation: Any) -> None:
    fed = federation("mlp", width=6, depth=2)
    result = fed.fuse(OTFusion(local=SETTINGS, first_weights="own"))
    states = [fed.upload("own_models", c).group("model") for c in fed.data]
    # client_2 has the most examples: 24, 32 and 40.
    assert fed.job.facts["reference"] == "client_2"
    channels = channels_of(fed.spec)
    moved = [align(states[0], states[2], channels), align(states[1], states[2], channels), states[2]]
    for name, tensor in result.model.state.items():
        wanted = (24 * moved[0][name] + 32 * moved[1][name] + 40 * moved[2][name]) / 96
        torch.testing.assert_close(tensor, wanted)


def test_matching_nothing_is_the_plain_mean(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    plain, control = fed.fuse(FedAvg(local=SETTINGS)), fed.fuse(OTFusion(local=SETTINGS, match_by="nothing"))
    torch.testing.assert_close(dict(control.model.state), dict(plain.model.state), rtol=0, atol=0)


def test_clients_of_different_widths_get_the_references(federation: Any) -> None:
    own = {"client_0": ("cnn", {"width": 8, "depth": 2}), "client_1": ("cnn", {"width": 5, "depth": 2})}
    fed = federation("cnn", width=4, depth=2, client_models=own)
    result = fed.fuse(OTFusion(local=SETTINGS))
    assert result.model.recipe["settings"]["width"] == 4
    assert result.model.module()(fed.test.x).shape == (60, 4)
    largest = fed.fuse(OTFusion(local=SETTINGS, reference="largest"))
    assert fed.job.facts["reference"] == "client_0"
    assert largest.model.recipe["settings"]["width"] == 8
    assert largest.model.module()(fed.test.x).isfinite().all()


@pytest.mark.parametrize(("family", "settings"), [("mlp", {"width": 4}), ("cnn", {"width": 4, "depth": 3})])
def test_another_architecture_is_refused_before_anybody_trains(
    federation: Any, family: str, settings: dict[str, Any]
) -> None:
    fed = federation("cnn", width=4, depth=2, client_models={"client_1": (family, settings)})
    with pytest.raises(ModelError) as caught:
        fed.fuse(OTFusion(local=SETTINGS))
    assert str(caught.value) == (
        "its model differs from the common one in more than the widths of its layers\n"
        "  where: client client_1\n"
        "  fix:   give all clients one architecture, or use ensemble, fusefl or a distillation method"
    )
    assert fed.cohort.ledger.exchanges() == []


def test_activations_are_matched_on_the_servers_data(federation: Any) -> None:
    fed = federation("cnn", width=4, depth=2)
    fed.job = dataclasses.replace(fed.job, server_data=Examples(fed.test.x[:20], fed.test.y[:20]))
    result = fed.fuse(OTFusion(local=SETTINGS, match_by="activations", num_samples=10))
    assert result.model.module()(fed.test.x).isfinite().all()


def test_activations_need_data_of_the_server(federation: Any) -> None:
    fed = federation("cnn", width=4, depth=2)
    with pytest.raises(ConfigError) as caught:
        fed.fuse(OTFusion(local=SETTINGS, match_by="activations"))
    assert str(caught.value) == (
        "activations can be matched on data of the server's only, and there is none\n"
        "  where: method.match_by\n"
        "  fix:   use match_by: weights, or give the server data"
    )


def test_no_samples_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        OTFusion(num_samples=0)
    assert str(caught.value) == "num_samples is 0\n  where: method.num_samples\n  fix:   give at least 1"


def test_a_client_with_one_example_and_a_missing_client_do_no_harm(federation: Any) -> None:
    fed = federation(
        "cnn", width=4, depth=2, num_examples=(1, 30, 20), absent={("local_models", "client_2")}, quorum=0.5
    )
    result = fed.fuse(OTFusion(local=SETTINGS))
    assert result.model.module()(fed.test.x).isfinite().all()


def test_digits_end_to_end() -> None:
    config = {
        "data": {"source": "digits", "limit": 600, "partition": {"scheme": "iid", "num_clients": 2}},
        "model": {"family": "mlp", "width": 32, "depth": 1},
        "method": {
            "name": "otfusion",
            "first_weights": "own",
            "local": {"num_epochs": 30, "batch_size": 16, "learning_rate": 0.05},
        },
        "runtime": {"name": "local", "workers": 1},
    }
    matched = fedfuse.run(config).accuracy
    plain = fedfuse.run(config, overrides=["method.match_by=nothing"]).accuracy
    assert matched is not None
    assert plain is not None
    assert matched > plain + 0.05
    assert matched > 0.8
