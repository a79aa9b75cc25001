"""The engine that makes inputs and teaches on them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fedfuse.core.checkpoints import Checkpoints
from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import InputSpace
from fedfuse.core.seeding import Rng
from fedfuse.models import spec
from fedfuse.models.generator import Pixels
from fedfuse.training.distillation import Distillation, Learner
from fedfuse.training.pool import Pool
from fedfuse.training.synthesis import Draft, Studio, Synthesis
from fedfuse.training.teachers import Teachers

SHAPE, NUM_CLASSES = (1, 8, 8), 3
PIXELS = InputSpace((0.5,), (0.25,), True, "crop_flip")
SMALL: dict[str, Any] = {"num_epochs": 3, "num_steps": 3, "batch_size": 6, "latent_size": 4, "width": 4}


def studio(
    *,
    inputs: InputSpace = PIXELS,
    checkpoints: Checkpoints | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
    source: Pixels | None = None,
    precision: Literal["fp32", "bf16"] = "fp32",
    distillation: Distillation | None = None,
    **settings: Any,
) -> Studio:
    facts: dict[str, Any] = {"input_shape": SHAPE, "num_classes": NUM_CLASSES}
    models = [spec("cnn", {"width": 4, "depth": 2}, seed=seed, **facts).build() for seed in (1, 2)]
    student = spec("cnn", {"width": 4, "depth": 2}, seed=3, **facts).build()
    return Studio(
        Synthesis(**{**SMALL, "precision": precision, **settings}),
        Learner(student, distillation or Distillation(batch_size=6, precision=precision), torch.device("cpu")),
        Teachers(models),
        inputs=inputs,
        input_shape=SHAPE,
        num_classes=NUM_CLASSES,
        rng=Rng(7),
        checkpoints=checkpoints,
        progress=progress,
        source=source,
    )


def sure(room: Studio) -> Callable[[Draft], Tensor]:
    return lambda draft: F.cross_entropy(room.teachers.mix(draft.logits), draft.labels)


def test_pixels_are_kept_in_8_bits() -> None:
    pool = Pool(is_pixels=True)
    pool.add(torch.tensor([[0.0, 1.0, 0.5, 2.0, -1.0]]), torch.tensor([3]))
    assert pool.stored.dtype == torch.uint8
    assert pool.stored.tolist() == [[0, 255, 128, 255, 0]]
    pool.add(torch.tensor([[1, 2, 3, 4, 5]], dtype=torch.uint8), torch.tensor([1]))
    torch.testing.assert_close(pool.images(torch.tensor([1])), torch.tensor([[1, 2, 3, 4, 5]]) / 255)
    assert (len(pool), pool.labels.tolist()) == (2, [3, 1])


def test_other_values_are_kept_as_they_are() -> None:
    pool = Pool(is_pixels=False)
    pool.add(torch.tensor([[-1.5, 7.0]]), torch.tensor([0]))
    assert pool.images(torch.tensor([0, 0])).tolist() == [[-1.5, 7.0]] * 2


def test_the_best_of_all_steps_is_kept() -> None:
    room, seen = studio(), []
    losses = iter([3.0, 1.0, 2.0])

    def objective(draft: Draft) -> Tensor:
        seen.append(draft.x.detach())
        return draft.x.sum() * 0 + next(losses)

    made, labels = room.make(objective)
    assert made.shape == (6, *SHAPE)
    assert labels.shape == (6,)
    assert not made.requires_grad
    # No gradient, so that the source stands still; every step has a view of its own of the same raw inputs.
    assert len(seen) == 3
    assert 0 <= made.min() <= made.max() <= 1


def test_making_follows_the_objective_and_leaves_the_models_alone() -> None:
    room = studio(num_steps=30, learning_rate=0.1, batch_size=16, inputs=InputSpace((0.5,), (0.25,), True))
    before = {name: tensor.clone() for name, tensor in room.learner.student.state_dict().items()}
    losses: list[float] = []

    def objective(draft: Draft) -> Tensor:
        loss = draft.distance - 0.0 * room.guess(draft.x).sum()
        losses.append(loss.item())
        return loss

    room.make(objective)
    assert min(losses) < 0.85 * losses[0]
    assert all(p.requires_grad and p.grad is None for p in room.learner.student.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in room.learner.student.state_dict().items())


def test_an_epoch_depends_on_its_number_alone() -> None:
    first, second = studio(), studio()
    second.make(sure(second))
    one, two = first.make(sure(first)), second.make(sure(second))
    assert torch.equal(one[0], two[0])
    second.epoch = 1
    assert not torch.equal(one[0], second.make(sure(second))[0])


def test_wanted_labels_and_pixels_as_source() -> None:
    room = studio(source=Pixels(6, SHAPE, is_pixels=True), num_steps=20, learning_rate=0.1)
    wanted = torch.tensor([0, 0, 1, 1, 2, 2])
    losses: list[float] = []

    def objective(draft: Draft) -> Tensor:
        losses.append(sure(room)(draft).item())
        return sure(room)(draft)

    _, labels = room.make(objective, labels=wanted)
    assert torch.equal(labels, wanted)
    assert min(losses) < losses[0]


def test_without_a_watch_the_distance_is_0_and_the_answers_are_the_same() -> None:
    room = studio()
    raw, labels = torch.rand(6, *SHAPE), torch.zeros(6, dtype=torch.int64)
    watched, blind = room.draft(raw, labels), room.draft(raw, labels, watch=False)
    assert watched.distance.item() > 0
    assert blind.distance.item() == 0
    assert torch.equal(watched.logits, blind.logits)


def test_a_lesson_teaches_the_common_answer() -> None:
    room = studio(distillation=Distillation(batch_size=6, learning_rate=0.05))
    room.pool.add(torch.rand(30, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.zeros(30).long())
    losses = []
    for room.epoch in range(12):
        losses.append(room.teach())
    assert losses[-1] < 0.5 * losses[0]
    assert not room.learner.student.training


@pytest.mark.parametrize("augment", ["none", "crop_flip"])
def test_a_pass_may_be_limited_and_given_another_lesson(augment: str) -> None:
    inputs = InputSpace((0.5,), (0.25,), True, augment)
    room = studio(distillation=Distillation(batch_size=6, num_batches=2), inputs=inputs)
    room.pool.add(torch.rand(30, *SHAPE), torch.arange(30) % 3)
    seen: list[Draft] = []

    def lesson(draft: Draft) -> Tensor:
        seen.append(draft)
        return F.cross_entropy(room.learner.student(draft.x), draft.labels)

    room.teach(lesson=lesson)
    assert [draft.labels.shape for draft in seen] == [(6,), (6,)]
    for draft in seen:
        torch.testing.assert_close(draft.logits, room.teachers.logits(draft.x), rtol=1e-4, atol=1e-5)


def test_what_perturbs_is_seen_by_teachers_and_student() -> None:
    room, asked = studio(inputs=InputSpace()), []
    room.pool.add(torch.rand(6, *SHAPE), torch.zeros(6).long())
    original = room.teachers.logits
    room.teachers.logits = lambda x: (asked.append(x), original(x))[1]  # type: ignore[method-assign,func-returns-value]
    room.teach(perturb=lambda x, draw: x * 0 + 4.0)
    assert len(asked) == 1
    assert (asked[0] == 4.0).all()


def test_answers_are_computed_once() -> None:
    room, num_asked = studio(inputs=InputSpace()), []
    original = room.teachers.logits
    room.teachers.logits = lambda x: (num_asked.append(len(x)), original(x))[1]  # type: ignore[method-assign,func-returns-value]
    for size in (6, 4):
        room.pool.add(torch.rand(size, *SHAPE), torch.zeros(size).long())
        room.answers()
        room.answers()
    assert num_asked == [6, 4]
    wanted = original(room.view(room.pool.images(torch.arange(10))))
    torch.testing.assert_close(room.answers(), wanted)


@pytest.mark.parametrize("is_pixels", [True, False])
def test_harder_inputs_are_one_step_away(is_pixels: bool) -> None:
    inputs = InputSpace((0.5,), (0.25,), is_pixels)
    room, step_size = studio(inputs=inputs), 8 / 255
    raw = torch.rand(6, *SHAPE, generator=torch.Generator().manual_seed(0))
    x = inputs.normalize(raw)
    moved = room.harder(x, torch.Generator().manual_seed(1), step_size)
    if is_pixels:
        distance = (inputs.restore(moved) - raw).abs()
        assert distance.max() <= step_size + 1e-6
        inner = (raw > step_size) & (raw < 1 - step_size)
        is_moved = distance > 1e-6
        torch.testing.assert_close(
            distance[inner & is_moved], torch.full_like(distance[inner & is_moved], step_size), atol=1e-5, rtol=0
        )
        assert (inputs.normalize(torch.zeros(1, 1, 1, 1)) - 1e-5 <= moved).all()
    else:
        assert set((moved - x).abs().mul(255).round().unique().tolist()) <= {0.0, 8.0}
    again = room.harder(x, torch.Generator().manual_seed(1), step_size)
    assert torch.equal(moved, again)
    assert not torch.equal(moved, room.harder(x, torch.Generator().manual_seed(2), step_size))


def run(room: Studio) -> list[int]:
    done = []
    for epoch in room.epochs():
        room.pool.add(*room.make(sure(room)))
        room.weights = room.weights * torch.tensor([1.1, 0.9])
        room.teach()
        done.append(epoch)
    return done


class Killed(Exception):
    """Stands for the end of the process."""


def test_a_killed_server_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    undisturbed = studio()
    assert run(undisturbed) == [0, 1, 2]

    def die(done: int, total: int) -> None:
        assert total == 3
        if done == 2:
            raise Killed

    with pytest.raises(Killed):
        run(studio(checkpoints=Checkpoints(tmp_path, "question"), progress=die))
    again = studio(checkpoints=Checkpoints(tmp_path, "question"))
    assert run(again) == [2]
    assert torch.equal(again.pool.stored, undisturbed.pool.stored)
    assert torch.equal(again.weights, undisturbed.weights)
    for name, tensor in undisturbed.learner.student.state_dict().items():
        assert torch.equal(tensor, again.learner.student.state_dict()[name]), name
    assert run(studio(checkpoints=Checkpoints(tmp_path, "another question"))) == [0, 1, 2]


def test_a_lost_part_of_the_pool_begins_again(tmp_path: Path) -> None:
    run(studio(checkpoints=Checkpoints(tmp_path, "question")))
    (tmp_path / "pool_1.safetensors").unlink()
    assert run(studio(checkpoints=Checkpoints(tmp_path, "question"))) == [0, 1, 2]


def test_what_a_method_keeps_comes_back(tmp_path: Path) -> None:
    counter = {"value": torch.zeros(1)}
    for wanted in (0.0, 1.0):
        room = studio(checkpoints=Checkpoints(tmp_path, "question"), num_epochs=1)
        room.keep("counter", lambda: {"value": counter["value"] + 1}, counter.update)
        run(room)
        assert counter["value"].item() == wanted


def test_half_precision_makes_nearly_the_same() -> None:
    made = []
    for precision in ("fp32", "bf16"):
        room = studio(precision=precision, num_steps=1)
        batch, labels = room.make(lambda draft, room=room: sure(room)(draft) + draft.distance)  # type: ignore[misc]
        assert batch.dtype == torch.float32
        room.pool.add(batch, labels)
        assert room.teach() >= 0
        made.append(batch)
    assert not torch.equal(*made)
    torch.testing.assert_close(*made, atol=0.02, rtol=0)


def test_a_loss_that_is_not_finite_stops() -> None:
    room = studio()
    with pytest.raises(DataError) as caught:
        room.make(lambda draft: draft.x.sum() * float("nan"))
    assert str(caught.value).startswith("the server's training diverged: the loss is nan\n  where: synthesis")


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"batch_size": 1}, "batch_size is 1\n  where: synthesis.batch_size\n  fix:   give at least 2"),
        ({"num_steps": 0}, "num_steps is 0\n  where: synthesis.num_steps\n  fix:   give at least 1"),
        (
            {"learning_rate": 0.0},
            "learning_rate is 0.0\n  where: synthesis.learning_rate\n  fix:   give a number above 0",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Synthesis(**settings)
    assert str(caught.value) == wanted
