"""Turning an artifact into one small model."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fedfuse
from fedfuse import models
from fedfuse.core.artifact import Artifact, detached_state
from fedfuse.core.errors import ArtifactError, ConfigError, DataError
from fedfuse.distilling import Distilled, _teachers, _unwrapped, distillers, read_material
from fedfuse.experiment import Observer
from fedfuse.methods.feddf import FedDF
from fedfuse.models.ensemble import Ensemble
from fedfuse.training import predict
from fedfuse.training.evaluation import evaluate

pytestmark = pytest.mark.filterwarnings("ignore:'click:DeprecationWarning")

CONFIG: dict[str, Any] = {
    "seed": 1,
    "data": {
        "source": "digits",
        "limit": 400,
        "test_limit": 100,
        "partition": {"scheme": "iid", "num_clients": 2},
        "server": {"num_examples": 120},
    },
    "model": {"family": "mlp", "width": 32, "depth": 1},
    "method": {"name": "ensemble", "local": {"num_epochs": 10, "learning_rate": 0.05}},
    "runtime": {"name": "local", "workers": 1},
    "server": {"threads": 1},
}
LEARNS = {"name": "feddf", "num_passes": 20, "distillation": {"learning_rate": 0.01, "batch_size": 32}}
STUDENT = "mlp[width=16,depth=1]"


@pytest.fixture(scope="module")
def ensemble(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    fedfuse.run(CONFIG, out=folder)
    return folder


@pytest.fixture(scope="module")
def fusefl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fusefl")
    method = {"name": "fusefl", "num_blocks": 2, "local": {"num_epochs": 6, "learning_rate": 0.05}}
    fedfuse.run({**CONFIG, "model": {"family": "mlp", "width": 32, "depth": 2}, "method": method}, out=folder)
    return folder


def test_an_ensemble_becomes_one_small_model_of_raw_inputs(ensemble: Path, tmp_path: Path) -> None:
    found = fedfuse.distill(ensemble, student=STUDENT, method=LEARNS, data="digits", out=tmp_path / "s")
    data = read_material("digits").held_out
    assert data is not None
    student, teacher = fedfuse.load(tmp_path / "s"), fedfuse.load(ensemble)
    assert found.student_accuracy == evaluate(student, data).accuracy
    assert found.teacher_accuracy == evaluate(teacher, data).accuracy
    same = (predict(student, data.x).argmax(1) == predict(teacher, data.x).argmax(1)).double().mean().item()
    assert found.agreement == same
    assert found.agreement > 0.8
    assert found.student_bytes < found.teacher_bytes / 3
    assert found.num_held_out == 359
    written = json.loads((tmp_path / "s" / "distilled.json").read_text())
    assert written == found.facts
    info = Artifact.read(tmp_path / "s" / "artifact").info
    assert info["distilled_from"] == Artifact.read(ensemble / "artifact").digest()
    assert info["input_shape"] == [1, 8, 8]
    assert not (tmp_path / "s" / "checkpoints").exists()


def test_a_fused_net_is_one_teacher(fusefl: Path, tmp_path: Path) -> None:
    found = fedfuse.distill(fusefl, student=STUDENT, method=LEARNS, data="digits", out=tmp_path / "s")
    assert found.agreement is not None
    assert found.agreement > 0.7


def test_members_are_teachers_behind_one_normalisation(ensemble: Path) -> None:
    module = fedfuse.load(ensemble)
    mean, std, inner = _unwrapped(module)
    assert [*mean, *std] == pytest.approx([0.3051, 0.3760])
    teachers = _teachers(inner, torch.device("cpu"))
    assert len(teachers.models) == 2
    x = torch.rand(5, 1, 8, 8)
    torch.testing.assert_close(teachers.answer((x - mean[0]) / std[0]), module(x).detach())


@pytest.mark.parametrize("combine", ["vote", "label_count", "mean_probabilities", "mean_logits"])
def test_an_ensemble_that_is_no_mean_of_logits_answers_as_a_whole(combine: str) -> None:
    members = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 3)) for _ in range(2)]
    net = Ensemble(members, combine=combine, num_classes=3)
    net.weights.copy_(torch.tensor([[0.9, 0.2, 0.2], [0.1, 0.8, 0.8]]))
    x = torch.rand(5, 1, 2, 2)
    wanted = net(x).detach()
    teachers = _teachers(net, torch.device("cpu"))
    assert teachers.models == [net]
    torch.testing.assert_close(teachers.answer(x), wanted)


def test_without_data_nothing_is_measured(ensemble: Path, tmp_path: Path) -> None:
    tiny = {"name": "dense", "synthesis": {"num_epochs": 2, "num_steps": 2, "batch_size": 16, "width": 4}}
    found = fedfuse.distill(ensemble, student=STUDENT, method=tiny, out=tmp_path / "s")
    assert (found.agreement, found.student_accuracy, found.num_held_out) == (None, None, 0)
    # The digits are images, so what was made can be looked at.
    assert (tmp_path / "s" / "pictures" / "dense.safetensors").exists()


def test_a_configuration_gives_the_servers_part_and_the_test_part(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    found = read_material(file, seed=1)
    assert found.inputs is not None
    assert found.held_out is not None
    assert (len(found.inputs), len(found.held_out), found.is_image) == (120, 100, True)
    assert 0 <= float(found.inputs.min()) <= float(found.inputs.max()) <= 1
    data = {key: value for key, value in CONFIG["data"].items() if key != "server"}
    file.write_text(yaml.safe_dump({**CONFIG, "data": data}), encoding="utf-8")
    # What clients own is not the server's.
    assert read_material(file).inputs is None


def test_a_source_may_be_limited() -> None:
    found = read_material("digits[limit=30,test_limit=10]")
    assert found.inputs is not None
    assert found.held_out is not None
    assert (len(found.inputs), len(found.held_out)) == (30, 10)
    with pytest.raises(ConfigError, match="limit"):
        read_material("digits[limit=0]")


def test_an_own_array_is_learned_on_and_measures_nothing(ensemble: Path, tmp_path: Path) -> None:
    x = read_material("digits").inputs
    assert x is not None
    found = fedfuse.distill(ensemble, student=STUDENT, method=LEARNS, data=x[:50], out=tmp_path / "s")
    assert found.agreement is None
    assert found.notes == (
        "the student learned on 50 inputs of the server's own",
        "the student is of another kind than the clients' models: it started fresh",
    )


def test_interrupted_work_goes_on_and_ends_with_the_same_bits(ensemble: Path, tmp_path: Path) -> None:
    class Killed(Observer):
        def server(self, what: str, done: int, total: int) -> None:
            if done == 3:
                raise KeyboardInterrupt

    seen: list[int] = []

    class Watching(Observer):
        def server(self, what: str, done: int, total: int) -> None:
            seen.append(done)

    def go(out: str, observer: Observer) -> Distilled:
        method = FedDF(num_passes=5)
        return fedfuse.distill(
            ensemble, student=STUDENT, method=method, data="digits", out=tmp_path / out, observer=observer
        )

    with pytest.raises(KeyboardInterrupt):
        go("a", Killed())
    resumed = go("a", Watching())
    assert seen[0] == 3
    assert resumed.artifact.digest() == go("b", Observer()).artifact.digest()


def test_an_artifact_without_facts_takes_its_shape_from_the_data(tmp_path: Path) -> None:
    spec = models.spec("mlp", {"width": 4, "depth": 1}, input_shape=(1, 8, 8), num_classes=3, seed=0)
    artifact = Artifact.of(spec, detached_state(spec.build()))
    with pytest.raises(ArtifactError) as caught:
        fedfuse.distill(artifact, student=STUDENT, out=tmp_path / "s")
    assert str(caught.value) == (
        "nothing says which inputs the artifact takes\n"
        "  where: artifact\n"
        "  fix:   give data, or distil an artifact of a run"
    )
    x = torch.rand(20, 1, 8, 8)
    found = fedfuse.distill(artifact, student=STUDENT, method=LEARNS, data=x, out=tmp_path / "s")
    assert found.artifact.recipe["num_classes"] == 3


def test_data_of_another_shape_is_refused(ensemble: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        fedfuse.distill(ensemble, student=STUDENT, data=torch.rand(4, 3, 8, 8), out=tmp_path / "s")
    assert str(caught.value) == (
        "the data has inputs of shape (3, 8, 8), and the artifact takes (1, 8, 8)\n"
        "  where: data\n"
        "  fix:   give data of the kind that the artifact was made for"
    )


@pytest.mark.parametrize("method", ["fedavg", "fedcvae", "fedsd2c"])
def test_methods_that_distil_no_models_are_refused(ensemble: Path, tmp_path: Path, method: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fedfuse.distill(ensemble, student=STUDENT, method=method, out=tmp_path / "s")
    assert caught.value.what == f'the method "{method}" distils no models'
    assert caught.value.fix == f"use one of {', '.join(distillers())}"
    assert {"dense", "feddf"} <= set(distillers())


@pytest.mark.parametrize(
    ("student", "method", "words"),
    [
        ({"width": 3}, "dense", "the student has no family"),
        ("mlp[width=3", "dense", '"mlp[width=3" lacks its closing bracket'),
        (STUDENT, {"name": "coboosting", "result": "ensemble"}, "the result of coboosting is no student but ensemble"),
        (STUDENT, {"name": "dense", "student": {"family": "mlp"}}, "the student is given twice"),
    ],
)
def test_what_cannot_be_read_is_told(ensemble: Path, tmp_path: Path, student: Any, method: Any, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        fedfuse.distill(ensemble, student=student, method=method, out=tmp_path / "s")
    assert caught.value.what == words


def test_the_command_prints_a_table(
    ensemble: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fedfuse import cli

    monkeypatch.setenv("COLUMNS", "120")
    out = str(tmp_path / "s")
    words = ["distill", str(ensemble), "--student", STUDENT, "--method", "feddf[num_passes=2]", "--data", "digits"]
    monkeypatch.setattr(sys, "argv", ["fedfuse", *words, "--set", "distillation.batch_size=64", "--out", out])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["size", "accuracy", "agreement"]
    assert lines[1].startswith("teacher")
    assert lines[2].startswith("student")
    assert "measured on 359 held-out inputs" in lines[3]
    assert lines[-1] == f"artifact: {Path(out) / 'artifact'}"
