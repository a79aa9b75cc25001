"""Encoders and decoders of all shapes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fedfuse
from fedfuse.core.artifact import Artifact, detached_state
from fedfuse.core.errors import ModelError
from fedfuse.models.autoencoder import Autoencoder, ConditionalDecoder, ConditionalEncoder, Decoder, Encoder

SHAPES = [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (2, 9, 14), (30,)]


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_encoded_is_decoded_to_its_shape(shape: tuple[int, ...]) -> None:
    net = Autoencoder(shape, latent_size=5, width=4, is_pixels=True)
    x = torch.rand(3, *shape)
    assert net.encode(x).shape == (3, 5)
    assert net(x).shape == x.shape
    made = net(x).detach()
    assert 0 <= float(made.min()) <= float(made.max()) <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_a_conditional_decoder_sees_the_class(shape: tuple[int, ...]) -> None:
    facts = {"num_classes": 4, "latent_size": 3, "width": 4}
    decoder, encoder = ConditionalDecoder(shape, **facts, is_pixels=False), ConditionalEncoder(shape, **facts)
    latent, labels = torch.zeros(2, 3), torch.tensor([0, 1])
    made = decoder(latent, labels)
    assert made.shape == (2, *shape)
    assert not torch.equal(made[0], made[1])
    mean, log_variance = encoder(made, labels)
    assert mean.shape == log_variance.shape == (2, 3)


def test_an_answer_does_not_depend_on_the_batch() -> None:
    net = Autoencoder((1, 8, 8), latent_size=5, width=4, is_pixels=True).train()
    x = torch.rand(6, 1, 8, 8)
    torch.testing.assert_close(net(x)[:1], net(x[:1]))


def test_an_autoencoder_is_an_artifact(tmp_path: Path) -> None:
    net = Autoencoder((1, 8, 8), latent_size=5, width=4, is_pixels=False).eval()
    Artifact(net.recipe, detached_state(net)).save(tmp_path / "a")
    loaded, x = fedfuse.load(tmp_path / "a"), torch.rand(2, 1, 8, 8)
    assert isinstance(loaded, Autoencoder)
    assert torch.equal(loaded(x), net(x))


@pytest.mark.parametrize(
    "make", [lambda: Encoder((3, 4), num_outputs=2, width=2), lambda: Decoder((3, 4), num_inputs=2, width=2)]
)
def test_other_shapes_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(ModelError) as caught:
        make()
    assert str(caught.value) == (
        "inputs of shape (3, 4) cannot be encoded and decoded\n"
        "  where: model\n"
        "  fix:   use a method that sends no images or decoders, such as ensemble or fusefl"
    )
