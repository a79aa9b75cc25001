"""Disguised and distilled images that clients upload."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import fedfuse
from fedfuse.core.artifact import Artifact, detached_state
from fedfuse.core.checkpoints import Checkpoints
from fedfuse.core.errors import ConfigError, DataError, FedfuseError
from fedfuse.core.examples import InputSpace
from fedfuse.methods.fedsd2c import FedSD2C, checked_soft_labels, packed, read_coder, unpacked
from fedfuse.models import spec
from fedfuse.models.autoencoder import Autoencoder
from fedfuse.training import LocalSGD, predict
from fedfuse.training.coreset import PixelCoder
from fedfuse.training.distillation import Distillation

SMALL = FedSD2C(
    local=LocalSGD(num_epochs=2, batch_size=16),
    distillation=Distillation(batch_size=16, kd_temperature=1.0),
    num_passes=3,
    images_per_class=2,
    num_crops=2,
    num_steps=3,
)
PIXELS = InputSpace((0.5,), (2.0,), is_pixels=True)


def pixels(fed: Any) -> None:
    """Say that inputs are images, as normalised as the data is."""
    fed.job = dataclasses.replace(fed.job, inputs=PIXELS)


def test_each_client_gets_its_own_model_back_and_sends_a_few_images(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    pixels(fed)
    found = fed.fuse(SMALL).model
    assert fed.cohort.ledger.exchanges() == ["local_models", "distillates"]
    for client_id in fed.data:
        sent = fed.message("distillates", client_id).group("model")
        own = fed.upload("local_models", client_id).group("model")
        assert all(torch.equal(sent[name], own[name]) for name in own)
        images = fed.upload("distillates", client_id).tensor("distillates/images")
        assert images.dtype == torch.uint8
        counts = torch.bincount(fed.data[client_id].train.y, minlength=4)
        assert images.shape == (int(counts.clamp(max=2).sum()), 1, 8, 8)
    assert found.module()(fed.test.x).shape == (60, 4)


def test_soft_labels_are_the_models_answers_to_what_the_server_sees(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    pixels(fed)
    fed.fuse(SMALL)
    upload = fed.upload("distillates", "client_2")
    model = Artifact.of(fed.spec, fed.upload("local_models", "client_2").group("model")).module()
    images = upload.tensor("distillates/images").float() / 255
    wanted = predict(model, PIXELS.normalize(images)).softmax(1)
    torch.testing.assert_close(upload.tensor("distillates/soft_labels"), wanted)


def test_no_image_leaves_as_it_is(federation: Any) -> None:
    fed = federation(width=4, depth=2, num_examples=(1, 24, 24))
    pixels(fed)
    fed.fuse(dataclasses.replace(SMALL, num_steps=0, smallest_crop=1.0))
    for client_id in fed.data:
        raw = PIXELS.restore(fed.data[client_id].train.x)
        sent = fed.upload("distillates", client_id).tensor("distillates/images").float() / 255
        distances = torch.cdist(sent.flatten(1), raw.flatten(1))
        assert float(distances.min()) > 0.3, client_id


def test_without_disguise_crops_and_steps_it_is_the_images_themselves(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    pixels(fed)
    fed.fuse(dataclasses.replace(SMALL, num_steps=0, smallest_crop=1.0, amplitude_weight=0.0))
    raw = PIXELS.restore(fed.data["client_0"].train.x)
    sent = fed.upload("distillates", "client_0").tensor("distillates/images").float() / 255
    assert float(torch.cdist(sent.flatten(1), raw.flatten(1)).min(1).values.max()) < 8 * 0.5 / 255


def test_images_that_are_no_pixels_travel_in_16_bits(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fed.fuse(SMALL)
    assert fed.upload("distillates", "client_0").tensor("distillates/images").dtype == torch.float16


def test_different_models_and_another_student(federation: Any) -> None:
    fed = federation(width=4, depth=2, client_models={"client_1": ("mlp", {"width": 4, "depth": 2})})
    pixels(fed)
    method = dataclasses.replace(SMALL, student={"family": "mlp", "width": 8, "depth": 1})
    assert fed.fuse(method).model.recipe["family"] == "mlp"


@pytest.mark.parametrize("exchange", ["local_models", "distillates"])
def test_a_client_may_leave_in_either_exchange(federation: Any, exchange: str) -> None:
    fed = federation(width=4, depth=2, absent={(exchange, "client_1")}, quorum=0.6)
    pixels(fed)
    assert fed.fuse(SMALL).model is not None
    assert list(fed.cohort.missing) == ["client_1"]


def test_vectors_are_refused_before_clients_work(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1, input_shape=(12,))
    with pytest.raises(ConfigError) as caught:
        fed.fuse(SMALL)
    assert str(caught.value) == (
        "fedsd2c sends images, and the models take inputs of shape (12,)\n"
        "  where: method.name\n"
        "  fix:   use fedcvae, which sends decoders, or any method that sends models"
    )
    assert fed.runtime.received == {}


def coder_in(folder: Path, seed: int = 0) -> str:
    torch.manual_seed(seed)
    net = Autoencoder((1, 8, 8), latent_size=6, width=4, is_pixels=True)
    return str(Artifact(net.recipe, detached_state(net)).save(folder))


def test_latent_values_travel_where_there_is_an_autoencoder(federation: Any, tmp_path: Path) -> None:
    fed = federation(width=4, depth=2)
    pixels(fed)
    fed.fuse(dataclasses.replace(SMALL, autoencoder=coder_in(tmp_path / "a"), learning_rate=0.1))
    sent = fed.upload("distillates", "client_0").tensor("distillates/images")
    assert sent.dtype == torch.float16
    assert sent.shape[1:] == (6,)


def test_an_autoencoder_that_is_not_the_servers_is_refused(tmp_path: Path) -> None:
    theirs = Artifact.read(coder_in(tmp_path / "a")).digest()
    own = coder_in(tmp_path / "b", seed=1)
    with pytest.raises(ConfigError) as caught:
        read_coder(own, theirs)
    assert str(caught.value) == (
        "the client's autoencoder is not the server's\n"
        f"  where: method.autoencoder: {own}\n"
        "  fix:   give every client the same artifact"
    )


def test_an_artifact_that_cannot_decode_is_no_autoencoder(tmp_path: Path, federation: Any) -> None:
    model = spec("mlp", {"width": 2, "depth": 1}, input_shape=(1, 8, 8), num_classes=2, seed=0)
    folder = Artifact.of(model, detached_state(model.build())).save(tmp_path / "a")
    fed = federation(width=4, depth=2)
    with pytest.raises(FedfuseError, match="has no encode and decode"):
        fed.fuse(dataclasses.replace(SMALL, autoencoder=str(folder)))
    assert fed.runtime.received == {}


def test_packing_pixels_costs_half_a_level_and_keeps_the_range() -> None:
    x = torch.linspace(-0.2, 1.2, 300).view(3, 1, 10, 10)
    back = unpacked(packed(x, is_pixels=True), PixelCoder(), InputSpace(is_pixels=True))
    assert float((back - x.clamp(0, 1)).abs().max()) <= 0.5 / 255 + 1e-6
    assert packed(x, is_pixels=False).dtype == torch.float16


def test_soft_labels_must_be_probabilities() -> None:
    fine = torch.tensor([[0.25, 0.75]])
    assert checked_soft_labels(fine, "a") is fine
    for bad in (torch.tensor([[0.5, 0.6]]), torch.tensor([[1.5, -0.5]])):
        with pytest.raises(DataError) as caught:
            checked_soft_labels(bad, "a")
        assert str(caught.value) == (
            "its soft labels are no probabilities\n  where: client a\n  fix:   leave this client out"
        )


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(federation: Any, tmp_path: Path) -> None:
    def go(stops_at: int | None) -> Artifact:
        fed = federation(width=4, depth=2)

        def progress(what: str, done: int, total: int) -> None:
            if done == stops_at:
                raise KeyboardInterrupt

        fed.job = dataclasses.replace(
            fed.job, checkpoints=Checkpoints(tmp_path / "kept"), progress=progress, inputs=PIXELS
        )
        model: Artifact = fed.fuse(SMALL).model
        return model

    with pytest.raises(KeyboardInterrupt):
        go(2)
    resumed = go(None)
    Checkpoints(tmp_path / "kept").clear()
    assert resumed.digest() == go(None).digest()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("num_passes", 0, "give at least 1"),
        ("images_per_class", 0, "give at least 1"),
        ("num_crops", 0, "give at least 1"),
        ("num_steps", -1, "give at least 0"),
        ("learning_rate", 0, "give a number above 0"),
        ("label_weight", -1, "give 0 or more"),
        ("smallest_crop", 0, "give a number above 0 and at most 1"),
        ("amplitude_weight", 2, "give a number in [0, 1]"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, value: float, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FedSD2C(**{name: value})  # type: ignore[arg-type]
    assert str(caught.value) == f"{name} is {value}\n  where: method.{name}\n  fix:   {words}"


def test_end_to_end_on_digits() -> None:
    config = {
        "data": {
            "source": "digits",
            "partition": {"scheme": "dirichlet", "num_clients": 3, "dirichlet_alpha": 0.2},
        },
        "model": {"family": "mlp", "width": 32, "depth": 1},
        "method": {
            "name": "fedsd2c",
            "local": {"num_epochs": 8},
            "images_per_class": 10,
            "num_crops": 4,
            "num_steps": 20,
            "distillation": {"learning_rate": 0.05},
        },
        "server": {"threads": 1},
        "runtime": {"name": "local", "workers": 1},
    }
    found = fedfuse.run(config)
    assert found.accuracy is not None
    assert found.accuracy > 0.6
