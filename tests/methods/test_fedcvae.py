"""Decoders that clients upload, and the classifier that learns from them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import fedfuse
from fedfuse.core.artifact import load_state
from fedfuse.core.errors import ConfigError, DataError, ModelError
from fedfuse.core.examples import InputSpace
from fedfuse.core.payload import Payload
from fedfuse.core.seeding import Rng
from fedfuse.methods.fedcvae import FedCVAE, as_decoded, empty_decoder, label_table
from fedfuse.methods.raw_inputs import inputs_message, read_inputs
from fedfuse.training import LocalSGD
from fedfuse.training.autoencoding import Autoencoding

SMALL = FedCVAE(
    autoencoding=Autoencoding(num_epochs=3, batch_size=8, latent_size=3, width=4),
    classifier=LocalSGD(num_epochs=2),
    num_draws=80,
)


def pixels(fed: Any) -> None:
    """Say that inputs are images, as normalised as the data is."""
    fed.job = dataclasses.replace(fed.job, inputs=InputSpace((0.5,), (2.0,), is_pixels=True))


@pytest.mark.parametrize("variant", ["ensemble", "distilled"])
@pytest.mark.parametrize("is_pixels", [True, False])
def test_a_classifier_comes_out(federation: Any, variant: Any, is_pixels: bool) -> None:
    fed = federation(width=4, depth=2)
    if is_pixels:
        pixels(fed)
    found = fed.fuse(dataclasses.replace(SMALL, variant=variant)).model
    assert found.recipe == fed.spec.recipe
    assert found.module()(fed.test.x).shape == (60, 4)
    assert fed.cohort.ledger.exchanges() == ["decoders"]


def test_only_the_decoder_and_counts_leave_a_client(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fed.fuse(SMALL)
    upload = fed.upload("decoders", "client_0")
    assert {key.split("/")[0] for key in upload} == {"decoder", "num_examples", "label_counts", "curve"}
    assert set(SMALL.tasks()) == {"train_decoder"}
    counts = torch.bincount(fed.data["client_0"].train.y, minlength=4)
    assert torch.equal(upload.tensor("label_counts"), counts)
    assert set(fed.message("decoders", "client_0")) == {"inputs/is_pixels", "inputs/mean", "inputs/std"}


def test_labels_are_drawn_as_clients_have_them(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    method = dataclasses.replace(SMALL, num_draws=4000)
    decoders = [
        empty_decoder(method.autoencoding, (1, 8, 8), 4, fed.job.inputs, Rng(number)).eval() for number in range(2)
    ]
    # Client 0 has class 2 only, client 1 three times as many of class 0.
    counts = torch.tensor([[0, 0, 10, 0], [30, 0, 0, 0]])
    latent, labels, drawn = method._drawn(decoders, counts, fed.job, "draws")
    assert set(labels.tolist()) == {0, 2}
    assert float((labels == 0).double().mean()) == pytest.approx(0.75, abs=0.03)
    assert float(latent.abs().max()) <= method.truncation
    for label, decoder in ((2, decoders[0]), (0, decoders[1])):
        some = (labels == label).nonzero()[:5, 0]
        torch.testing.assert_close(drawn[some], decoder(latent[some], labels[some]).detach())


def test_the_server_rebuilds_the_decoder_that_was_sent(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fed.fuse(SMALL)
    decoder = empty_decoder(SMALL.autoencoding, (1, 8, 8), 4, fed.job.inputs, Rng(0))
    load_state(decoder, fed.upload("decoders", "client_1").group("decoder"))
    assert decoder(torch.zeros(1, 3), torch.tensor([0])).shape == (1, 1, 8, 8)


def test_one_decoder_learns_what_many_draw(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    method = dataclasses.replace(
        SMALL, autoencoding=Autoencoding(num_epochs=20, batch_size=16, latent_size=3, width=4), num_draws=200
    )
    teacher = empty_decoder(method.autoencoding, (1, 8, 8), 4, fed.job.inputs, Rng(1)).eval()
    latent, labels, drawn = method._drawn([teacher], torch.ones(1, 4, dtype=torch.int64), fed.job, "draws")
    student = empty_decoder(method.autoencoding, (1, 8, 8), 4, fed.job.inputs, Rng(2))
    before = float((student(latent, labels) - drawn).detach().square().mean())
    method._one_decoder(student, latent, labels, drawn, fed.job)
    assert float((student(latent, labels) - drawn).detach().square().mean()) < 0.1 * before


def test_vectors_work_too(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1, input_shape=(12,))
    assert fed.fuse(SMALL).model.module()(fed.test.x).shape == (60, 4)


def test_a_client_with_one_example_of_one_class(federation: Any) -> None:
    fed = federation(width=4, depth=2, num_examples=(1, 24, 24))
    assert fed.fuse(SMALL).model is not None
    assert fed.upload("decoders", "client_0").tensor("label_counts").sort().values.tolist() == [0, 0, 0, 1]


def test_a_missing_client_is_missed_only_by_its_classes(federation: Any) -> None:
    fed = federation(width=4, depth=2, absent={("decoders", "client_1")}, quorum=0.6)
    assert fed.fuse(SMALL).model is not None
    assert list(fed.cohort.missing) == ["client_1"]


def test_clients_may_own_any_models_and_the_student_may_be_another(federation: Any) -> None:
    fed = federation(width=4, depth=2, client_models={"client_1": ("mlp", {"width": 4, "depth": 1})})
    method = dataclasses.replace(SMALL, student={"family": "mlp", "width": 4, "depth": 1})
    assert fed.fuse(method).model.recipe["family"] == "mlp"


def test_what_the_server_says_of_inputs_arrives() -> None:
    inputs = InputSpace((0.1307,), (0.3081,), is_pixels=True)
    assert read_inputs(Payload.decode(inputs_message(inputs).encode())) == inputs
    assert read_inputs(inputs_message(InputSpace())) == InputSpace()


def test_pixels_are_decoded_raw_and_other_inputs_normalised() -> None:
    x = torch.tensor([[[[-0.25, 0.25]]]])
    assert as_decoded(InputSpace((0.5,), (2.0,), is_pixels=True), x).flatten().tolist() == [0.0, 1.0]
    assert torch.equal(as_decoded(InputSpace((0.5,), (2.0,)), x), x)


class Said(dict[str, Payload]):
    """Replies as a method reads them."""

    def numbers(self, key: str) -> dict[str, float]:
        return {name: upload.number(key) for name, upload in self.items()}


def test_counts_that_do_not_add_up_are_refused() -> None:
    said = Said(a=Payload({"num_examples": 3, "label_counts": torch.tensor([1, 1])}))
    with pytest.raises(DataError) as caught:
        label_table(said)  # type: ignore[arg-type]
    assert str(caught.value) == (
        "its label counts [1, 1] are not those of 3 examples\n  where: client a\n  fix:   leave this client out"
    )


def test_an_unknown_shape_costs_the_run_one_clear_error(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1, input_shape=(3, 4))
    with pytest.raises(ModelError, match=r"inputs of shape \(3, 4\) cannot be encoded"):
        fed.fuse(SMALL)
    assert fed.runtime.received == {}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("truncation", "truncation is 0\n  where: method.truncation\n  fix:   give a number above 0"),
        ("num_draws", "num_draws is 0\n  where: method.num_draws\n  fix:   give at least 2"),
    ],
)
def test_settings_out_of_range_are_refused(name: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FedCVAE(**{name: 0})  # type: ignore[arg-type]
    assert str(caught.value) == words


def test_end_to_end_on_digits_with_a_class_at_one_client_only() -> None:
    config = {
        "data": {"source": "digits", "partition": {"scheme": "shards", "num_clients": 5}},
        "model": {"family": "mlp", "width": 32, "depth": 1},
        "method": {
            "name": "fedcvae",
            "num_draws": 1500,
            "autoencoding": {"num_epochs": 12, "width": 12},
            "classifier": {"num_epochs": 10, "learning_rate": 0.05},
        },
        "server": {"threads": 1},
        "runtime": {"name": "local", "workers": 1},
    }
    found = fedfuse.run(config)
    assert found.accuracy is not None
    # The mean of models that know two classes each is next to chance.
    assert found.accuracy > 0.6
