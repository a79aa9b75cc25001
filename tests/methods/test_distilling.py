"""What all methods that make their own inputs have in common."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedfuse.core.artifact import Artifact
from fedfuse.core.checkpoints import Checkpoints
from fedfuse.core.errors import ConfigError
from fedfuse.core.examples import InputSpace
from fedfuse.methods.adi import ADI
from fedfuse.methods.coboosting import CoBoosting
from fedfuse.methods.dafl import DAFL
from fedfuse.methods.dense import Dense
from fedfuse.methods.distilling import NO_BATCHNORM
from fedfuse.methods.intactofl import IntactOFL
from fedfuse.models import spec
from fedfuse.training import LocalSGD
from fedfuse.training.distillation import Distillation
from fedfuse.training.synthesis import Synthesis

LOCAL = LocalSGD(num_epochs=1, batch_size=16)
PIXELS = InputSpace((0.5,), (0.25,), True, "crop_flip")
TINY = Synthesis(num_epochs=4, num_steps=2, batch_size=6, latent_size=4, width=4)
BRIEF = Distillation(batch_size=6, num_batches=2)
COMMON: dict[str, Any] = {"local": LOCAL, "synthesis": TINY, "distillation": BRIEF}
METHODS: dict[str, Callable[..., Any]] = {
    "adi": ADI,
    "coboosting": lambda **others: CoBoosting(**{"batchnorm_weight": 1.0, **others}),
    "dafl": DAFL,
    "dense": Dense,
    "intactofl": IntactOFL,
}
STUDENTS = ["adi", "coboosting", "dafl", "dense"]
NAMES = sorted(METHODS)


class Killed(Exception):
    """Stands for the end of the process."""


def with_job(fed: Any, **others: Any) -> Any:
    """The federation with other facts in its job; notes are its own."""
    fed.job = dataclasses.replace(fed.job, facts={}, **others)
    return fed


def check_answers(artifact: Artifact, input_shape: tuple[int, ...] = (1, 8, 8)) -> None:
    again = Artifact(artifact.recipe, artifact.state).module()
    x = torch.randn(3, *input_shape, generator=torch.Generator().manual_seed(0))
    found = again(x)
    assert found.shape == (3, 4)
    assert found.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_a_killed_server_goes_on_with_the_same_bits(federation: Any, tmp_path: Path, name: str) -> None:
    method = METHODS[name](**COMMON)
    checkpoints = Checkpoints(tmp_path, "question")
    fed = with_job(federation(width=4, depth=2), inputs=PIXELS)
    undisturbed = fed.fuse(method).model

    def die(what: str, done: int, total: int) -> None:
        if done == 3:
            raise Killed

    with_job(fed, checkpoints=checkpoints, progress=die)
    with pytest.raises(Killed):
        fed.fuse(method)
    told: list[int] = []
    with_job(fed, checkpoints=checkpoints, progress=lambda what, done, total: told.append(done))
    again = fed.fuse(method).model
    assert told == [3, 4]
    assert again.digest() == undisturbed.digest()


@pytest.mark.parametrize("name", NAMES)
def test_heterogeneous_models_and_what_is_shown(federation: Any, name: str) -> None:
    other = {"client_1": ("mlp", {"width": 8, "depth": 1})}
    pictures: dict[str, Tensor] = {}
    fed = with_job(federation(width=4, depth=2, client_models=other), inputs=PIXELS, picture=pictures.__setitem__)
    result = fed.fuse(METHODS[name](**COMMON)).model
    check_answers(result)
    assert list(pictures) == [name]
    images = pictures[name]
    assert images.shape[1:] == (1, 8, 8)
    assert 0 <= images.min() <= images.max() <= 1
    assert "notes" not in fed.job.facts
    assert fed.cohort.ledger.exchanges() == ["local_models"]


@pytest.mark.parametrize("norm", ["group", "none"])
@pytest.mark.parametrize("name", ["adi", "coboosting", "dense", "intactofl"])
def test_without_batchnorm_the_run_says_so_and_goes_on(federation: Any, name: str, norm: str) -> None:
    fed = with_job(federation(width=4, depth=2, norm=norm))
    check_answers(fed.fuse(METHODS[name](**COMMON)).model)
    assert fed.job.facts["notes"] == [NO_BATCHNORM]
    with_job(fed)
    fed.fuse(METHODS[name](**COMMON, batchnorm_weight=0.0))
    assert "notes" not in fed.job.facts


@pytest.mark.parametrize("name", NAMES)
def test_vectors_one_client_and_one_example(federation: Any, name: str) -> None:
    fed = with_job(federation("mlp", width=8, depth=1, input_shape=(5,), num_clients=1, num_examples=(1,)))
    check_answers(fed.fuse(METHODS[name](**COMMON)).model, (5,))


@pytest.mark.parametrize("name", STUDENTS)
def test_the_student_is_of_any_family(federation: Any, name: str) -> None:
    fed = with_job(federation(width=4, depth=2), inputs=PIXELS)
    result = fed.fuse(METHODS[name](**COMMON, student={"family": "mlp", "width": 8, "depth": 1})).model
    assert result.recipe["family"] == "mlp"
    check_answers(result)


def test_a_student_without_a_family_is_refused_before_anybody_works(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    with pytest.raises(ConfigError) as caught:
        fed.fuse(Dense(**COMMON, student={"width": 4}))
    assert str(caught.value) == (
        "the student has no family\n  where: method.student.family\n  fix:   write student: {family: cnn, ...}"
    )
    assert fed.cohort.ledger.exchanges() == []


def test_inputs_that_cannot_be_made_are_refused(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1, input_shape=(3, 4))
    with pytest.raises(ConfigError) as caught:
        fed.fuse(Dense(**COMMON))
    assert str(caught.value) == (
        "dense makes images or vectors, and the models take inputs of shape (3, 4)\n  where: method.name\n"
        "  fix:   use a method that makes no inputs, such as feddf with server data, or fusefl"
    )


def test_the_student_starts_from_fresh_weights_and_the_models_stay_as_they_were(federation: Any) -> None:
    fed = with_job(federation(width=4, depth=2), inputs=PIXELS)
    method = Dense(**COMMON)
    learner = method.learner(fed.job)
    first = spec("cnn", {"width": 4, "depth": 2}, input_shape=(1, 8, 8), num_classes=4, seed=11).build()
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, learner.student.state_dict()[name])
