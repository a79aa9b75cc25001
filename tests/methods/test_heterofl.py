"""Every client trains a part of the largest model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedfuse.core.errors import ModelError
from fedfuse.methods.fedavg import FedAvg
from fedfuse.methods.heterofl import HeteroFL
from fedfuse.training import LocalSGD, predict

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)
WIDTHS = {"client_0": ("mlp", {"width": 4, "depth": 2}), "client_1": ("mlp", {"width": 2, "depth": 2})}


def test_each_number_is_averaged_over_the_clients_that_hold_it(federation: Any) -> None:
    fed = federation("mlp", client_models=WIDTHS, width=6, depth=2)
    fused = fed.fuse(HeteroFL(local=SETTINGS))
    parts = {c: fed.upload("round_0", c).group("model") for c in ("client_0", "client_1", "client_2")}
    whole = fused.personal["client_2"].state["1.weight"]
    assert whole.shape == (6, 64)
    by_hand = [
        (24 * parts["client_0"]["1.weight"][0, 0] + 32 * parts["client_1"]["1.weight"][0, 0]
         + 40 * parts["client_2"]["1.weight"][0, 0]) / 96,
        (24 * parts["client_0"]["1.weight"][3, 5] + 40 * parts["client_2"]["1.weight"][3, 5]) / 64,
        parts["client_2"]["1.weight"][5, 63],
    ]  # fmt: skip
    assert torch.allclose(torch.stack([whole[0, 0], whole[3, 5], whole[5, 63]]), torch.stack(by_hand), atol=1e-6)
    for client_id, width in (("client_0", 4), ("client_1", 2)):
        own = fused.personal[client_id].state["3.weight"]
        assert torch.equal(own, fused.personal["client_2"].state["3.weight"][:width, :width])


def test_clients_start_from_parts_of_the_largest_models_first_weights(federation: Any) -> None:
    fed = federation("mlp", client_models=WIDTHS, width=6, depth=2)
    fed.fuse(HeteroFL(local=SETTINGS, num_rounds=2))
    first = fed.spec.build().state_dict()
    sent = fed.message("round_0", "client_1").group("model")
    assert torch.equal(sent["3.weight"], first["3.weight"][:2, :2])
    assert torch.equal(sent["5.weight"], first["5.weight"][:, :2])
    # Who owns the largest has them already.
    assert not fed.message("round_0", "client_2").group("model")
    assert fed.message("round_1", "client_2").group("model")["3.weight"].shape == (6, 6)


@pytest.mark.parametrize("num_rounds", [1, 2])
def test_with_equal_models_it_is_fedavg(federation: Any, num_rounds: int) -> None:
    fed = federation(width=4, depth=2)
    wanted = fed.fuse(FedAvg(local=SETTINGS, num_rounds=num_rounds)).model
    found = fed.fuse(HeteroFL(local=SETTINGS, num_rounds=num_rounds)).model
    assert sorted(found.state) == sorted(wanted.state)
    assert all(torch.equal(found.state[name], wanted.state[name]) for name in wanted.state)


@pytest.mark.parametrize(
    ("family", "large", "small"),
    [
        ("cnn", {"width": 8, "depth": 2}, {"width": 4, "depth": 2}),
        ("resnet", {"width": 4, "depth": 18}, {"width": 2, "depth": 18}),
        ("vit", {"width": 16, "depth": 2, "heads": 4}, {"width": 8, "depth": 2, "heads": 2}),
    ],
)
def test_families_of_images_are_nested_by_their_width(
    federation: Any, family: str, large: dict[str, Any], small: dict[str, Any]
) -> None:
    fed = federation(family, client_models={"client_1": (family, small)}, **large)
    fused = fed.fuse(HeteroFL(local=LocalSGD(num_epochs=1, batch_size=16)))
    inputs = fed.test.x
    assert all(predict(artifact.module(), inputs).shape == (60, 4) for artifact in fused.personal.values())


def test_queries_keys_and_values_of_a_narrow_transformer_are_parts_of_each(federation: Any) -> None:
    large, small = {"width": 16, "depth": 1, "heads": 2}, {"width": 8, "depth": 1, "heads": 1}
    fed = federation("vit", client_models={"client_1": ("vit", small)}, **large)
    fed.fuse(HeteroFL(local=LocalSGD(num_epochs=1, batch_size=16)))
    first = fed.spec.build().state_dict()["1.attention.inner.weight"]
    sent = fed.message("round_0", "client_1").group("model")["1.attention.inner.weight"]
    assert torch.equal(sent, torch.cat([first[start : start + 8, :8] for start in (0, 16, 32)]))


def test_a_shallower_model_holds_fewer_layers(federation: Any) -> None:
    shallow = {"client_1": ("vit", {"width": 8, "depth": 1, "heads": 2, "pool": "mean"})}
    fed = federation("vit", client_models=shallow, width=8, depth=2, heads=2)
    with pytest.raises(ModelError) as caught:
        fed.fuse(HeteroFL(local=SETTINGS))
    # In a sequence the layers behind have other numbers, so this is no part of it.
    assert str(caught.value) == (
        'a client\'s model is no part of the largest one: "2.weight", which the largest lacks\n'
        "  where: model.clients\n"
        "  fix:   use one family and change its width or its depth only, or another method"
    )


def test_a_model_that_is_wider_somewhere_is_refused(federation: Any) -> None:
    wide = {"client_1": ("mlp", {"width": 7, "depth": 1})}
    fed = federation("mlp", client_models=wide, width=5, depth=6)
    with pytest.raises(ModelError) as caught:
        fed.fuse(HeteroFL(local=SETTINGS))
    assert '"1.weight" of shape (7, 64), in the largest (5, 64)' in str(caught.value)
