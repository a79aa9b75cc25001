"""Ensemble distillation on unlabelled inputs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import fedfuse
from fedfuse.core.artifact import Artifact, detached_state
from fedfuse.core.checkpoints import Checkpoints
from fedfuse.core.errors import ConfigError
from fedfuse.core.examples import InputSpace
from fedfuse.data.server import unlabelled
from fedfuse.methods.fedavg import FedAvg
from fedfuse.methods.feddf import FedDF
from fedfuse.training import LocalSGD, predict
from fedfuse.training.distillation import Distillation
from fedfuse.training.synthesis import Synthesis
from fedfuse.training.teachers import Teachers

LOCAL = LocalSGD(num_epochs=2, batch_size=16)
SLOW = Distillation(batch_size=16, learning_rate=0.01, kd_temperature=1.0)
TINY = Synthesis(num_epochs=2, num_steps=2, batch_size=8, latent_size=4, width=4)


def given(fed: Any, n: int = 40) -> None:
    """Give the server some inputs."""
    x = torch.randn(n, *fed.spec.input_shape, generator=torch.Generator().manual_seed(7))
    fed.job = dataclasses.replace(fed.job, server_data=unlabelled(x))


def test_one_client_whose_model_the_student_is_teaches_it_nothing(federation: Any) -> None:
    # The student starts as its teacher: the divergence is 0, and so is its gradient.
    fed = federation("mlp", width=4, depth=1, num_clients=1)
    given(fed)
    found = fed.fuse(FedDF(local=LOCAL, num_passes=3, distillation=SLOW)).model
    own = fed.upload("local_models", "client_0").group("model")
    for name, tensor in own.items():
        torch.testing.assert_close(found.state[name], tensor, rtol=0, atol=1e-6)


def test_without_a_learning_rate_to_speak_of_it_is_fedavg(federation: Any) -> None:
    fed = federation(width=4, depth=2, norm="none")
    given(fed)
    averaged = fed.fuse(FedAvg(local=LOCAL)).model
    still = dataclasses.replace(SLOW, learning_rate=1e-12)
    found = fed.fuse(FedDF(local=LOCAL, num_passes=1, distillation=still)).model
    for name, tensor in averaged.state.items():
        torch.testing.assert_close(found.state[name], tensor, rtol=1e-5, atol=1e-6)
    # The question is the one that every one-round method asks.
    assert all(entry.from_journal for entry in fed.cohort.ledger.entries)


def test_the_student_comes_nearer_to_the_ensemble(federation: Any) -> None:
    fed = federation("mlp", width=8, depth=1)
    given(fed, 60)
    x = fed.job.server_data.x
    found = fed.fuse(FedDF(local=LOCAL, num_passes=10, distillation=SLOW, start="fresh")).model.module()
    models = [Artifact.of(fed.spec, fed.upload("local_models", c).group("model")).module() for c in fed.data]
    wanted = predict(Teachers(models).answer, x).softmax(1)

    def gap(module: torch.nn.Module) -> float:
        return float((predict(module, x).softmax(1) - wanted).abs().mean())

    assert gap(found) < 0.5 * gap(fed.spec.build())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ("noise", "the student learned on 50 inputs of pure noise"),
        ("synthetic", "the student learned on 16 inputs made from the clients' models"),
        ("auto", "the student learned on 16 inputs made from the clients' models"),
    ],
)
@pytest.mark.parametrize("model", ["cnn", "mlp"])
def test_without_server_data_it_says_what_it_used(federation: Any, data: Any, words: str, model: str) -> None:
    fed = federation(model, width=4, depth=2)
    method = FedDF(local=LOCAL, data=data, num_passes=1, num_noise=50, synthesis=TINY, distillation=SLOW)
    assert fed.fuse(method).model.module()(fed.test.x).shape == (60, 4)
    assert words in fed.job.facts["notes"]


def test_server_data_is_used_where_there_is_some(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1)
    given(fed)
    fed.fuse(FedDF(local=LOCAL, num_passes=1, distillation=SLOW))
    assert fed.job.facts["notes"] == ["the student learned on 40 inputs of the server's own"]


def test_pixels_of_noise_are_uniform_and_other_noise_is_normalised(federation: Any) -> None:
    fed, method = federation("mlp", width=4, depth=1), FedDF(num_noise=4000)
    assert float(method._inputs("noise", fed.job).std()) == pytest.approx(1.0, abs=0.01)
    pixels = dataclasses.replace(fed.job, inputs=InputSpace((0.5,), (0.25,), is_pixels=True))
    noise = method._inputs("noise", pixels)
    assert 0 <= float(noise.min()) <= float(noise.max()) <= 1
    assert float(noise.var()) == pytest.approx(1 / 12, abs=0.001)


def test_clients_with_other_models_teach_a_fresh_student(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1, client_models={"client_1": ("cnn", {"width": 4, "depth": 2})})
    given(fed)
    found = fed.fuse(FedDF(local=LOCAL, num_passes=1, distillation=SLOW)).model
    assert found.recipe == fed.spec.recipe
    assert "the student is of another kind than the clients' models: it started fresh" in fed.job.facts["notes"]


def test_a_student_of_another_family_starts_fresh(federation: Any) -> None:
    fed = federation("cnn", width=4, depth=2)
    given(fed)
    method = FedDF(local=LOCAL, num_passes=1, distillation=SLOW, student={"family": "mlp", "width": 4, "depth": 1})
    assert fed.fuse(method).model.recipe["family"] == "mlp"


def test_a_fresh_start_is_the_common_first_weights(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1)
    given(fed)
    still = dataclasses.replace(SLOW, learning_rate=1e-12)
    found = fed.fuse(FedDF(local=LOCAL, num_passes=1, distillation=still, start="fresh")).model
    for name, tensor in detached_state(fed.spec.build()).items():
        torch.testing.assert_close(found.state[name], tensor)
    assert len(fed.job.facts["notes"]) == 1


def test_a_killed_run_goes_on_and_ends_with_the_same_bits(federation: Any, tmp_path: Path) -> None:
    def go(stops_at: int | None) -> Artifact:
        fed = federation("mlp", width=4, depth=1)
        given(fed)

        def progress(what: str, done: int, total: int) -> None:
            if done == stops_at:
                raise KeyboardInterrupt

        fed.job = dataclasses.replace(fed.job, checkpoints=Checkpoints(tmp_path / "kept"), progress=progress)
        model: Artifact = fed.fuse(FedDF(local=LOCAL, num_passes=4)).model
        return model

    with pytest.raises(KeyboardInterrupt):
        go(2)
    resumed = go(None)
    Checkpoints(tmp_path / "kept").clear()
    assert resumed.digest() == go(None).digest()


def test_server_data_that_is_not_there_is_told_before_clients_work(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1)
    with pytest.raises(ConfigError) as caught:
        fed.fuse(FedDF(local=LOCAL, data="server"))
    assert str(caught.value) == (
        "the server has no data of its own\n"
        "  where: method.data\n"
        "  fix:   declare some with data: {server: ...}, or use data: synthetic or noise"
    )
    assert fed.runtime.received == {}


@pytest.mark.parametrize(("name", "least"), [("num_passes", 1), ("num_noise", 2)])
def test_too_few_are_refused(name: str, least: int) -> None:
    with pytest.raises(ConfigError) as caught:
        FedDF(**{name: 0})  # type: ignore[arg-type]
    assert str(caught.value) == f"{name} is 0\n  where: method.{name}\n  fix:   give at least {least}"


def test_inputs_of_any_shape_are_taken_from_the_server(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1, input_shape=(3, 4))
    given(fed)
    assert fed.fuse(FedDF(local=LOCAL, num_passes=1, distillation=SLOW)).model is not None


def test_end_to_end_on_digits() -> None:
    config = {
        "data": {
            "source": "digits",
            "partition": {"scheme": "dirichlet", "num_clients": 3, "dirichlet_alpha": 0.2},
            "server": {"fraction": 0.2},
        },
        "model": {"family": "mlp", "width": 32, "depth": 1},
        "method": {"name": "fedavg", "local": {"num_epochs": 5}},
        "server": {"threads": 1},
        "runtime": {"name": "local", "workers": 1},
    }
    averaged = fedfuse.run(config)
    found = fedfuse.run({**config, "method": {"name": "feddf", "local": {"num_epochs": 5}}})
    assert averaged.accuracy is not None
    assert found.accuracy is not None
    assert found.accuracy > averaged.accuracy
    assert found.facts["facts"]["notes"] == ["the student learned on 288 inputs of the server's own"]
