"""Turn any artifact, an ensemble or a fused net, into one small model that is cheap to run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse import models
from fedfuse.core import VERSION
from fedfuse.core.artifact import Artifact
from fedfuse.core.checkpoints import Checkpoints
from fedfuse.core.client import fixed_threads
from fedfuse.core.errors import ArtifactError, ConfigError, DataError
from fedfuse.core.examples import Examples, InputSpace
from fedfuse.core.files import write_atomically
from fedfuse.core.method import Job
from fedfuse.core.payload import Payload
from fedfuse.core.registry import METHODS, SOURCES
from fedfuse.core.seeding import Rng, derive_seed
from fedfuse.core.settings import to_json
from fedfuse.data.server import server_inputs, unlabelled
from fedfuse.experiment import Observer, read_config, split_outside_brackets
from fedfuse.experiment.configuration import named, override
from fedfuse.experiment.setting import Loader
from fedfuse.methods.distilling import Distilling
from fedfuse.models.ensemble import Ensemble
from fedfuse.models.normalized import Normalized, normalized_artifact
from fedfuse.training import predict
from fedfuse.training.evaluation import score
from fedfuse.training.teachers import Teachers

_NO_SHAPE = "nothing says which inputs the artifact takes"


@dataclass(frozen=True)
class Distilled:
    """A small model and what it was measured to be.

    Args:
        folder: holds ``artifact`` and ``distilled.json``.
        artifact: the student; takes the inputs that the teacher takes.
        teacher_bytes: size of the teacher's tensors.
        student_bytes: size of the student's.
        agreement: fraction of held-out inputs on which both predict the same class; ``None`` without such inputs.
        teacher_accuracy: on held-out labels; ``None`` without them.
        student_accuracy: on held-out labels; ``None`` without them.
        num_held_out: held-out inputs.
        notes: what the method said about the work.
    """

    folder: Path
    artifact: Artifact
    teacher_bytes: int
    student_bytes: int
    agreement: float | None
    teacher_accuracy: float | None
    student_accuracy: float | None
    num_held_out: int
    notes: tuple[str, ...]

    @property
    def facts(self) -> dict[str, Any]:
        """The numbers as ``distilled.json`` holds them."""
        names = ("teacher_bytes", "student_bytes", "agreement", "teacher_accuracy", "student_accuracy", "num_held_out")
        return {**{name: getattr(self, name) for name in names}, "notes": list(self.notes)}


@dataclass(frozen=True)
class Material:
    """Data for a distillation.

    Args:
        inputs: raw, without labels; what the student may learn on; ``None`` where there are none.
        held_out: raw examples that only measure; labels of -1 say that there are inputs only.
        is_image: whether raw inputs are images in [0, 1]; ``None`` where nobody knows.
        augment: name of the augmentation that the models were trained with.
    """

    inputs: Tensor | None = None
    held_out: Examples | None = None
    is_image: bool | None = None
    augment: str = "none"


def distill(
    artifact: str | Path | Artifact,
    *,
    student: str | Mapping[str, Any],
    method: str | Mapping[str, Any] | Distilling = "dense",
    data: Any = None,
    out: str | Path,
    overrides: Sequence[str] = (),
    seed: int = 0,
    threads: int = 1,
    device: str = "cpu",
    observer: Observer | None = None,
) -> Distilled:
    """Teach one small model what an artifact knows.

    The members of an ensemble are teachers side by side, any other artifact is one teacher. Interrupted work goes on
    from its checkpoints when the same call is made again.

    Args:
        artifact: an artifact or its folder, or a run's folder that holds one.
        student: ``"cnn[width=8]"`` or ``{"family": "cnn", "width": 8}``.
        method: a distillation method by name, with settings in brackets or as a table, or such a method itself.
        data: a configuration's YAML file, a source such as ``"digits"`` or ``"npz[path=x.npz,limit=5000]"``, a data
            set or array of inputs of one's own, or nothing. Of a configuration the server's part is learned on, of a
            source or an own data set the training part; labels are never learned. The test part only measures.
        out: folder of the result.
        overrides: ``setting=value`` of the method.
        seed: decides first weights and all random choices.
        threads: torch threads; their number changes bits.
        device: ``cpu`` or ``cuda``.
        observer: hears how far the work is.

    Returns:
        The student and its numbers.

    Raises:
        ArtifactError: there is no whole artifact, or nothing says which inputs it takes.
        ConfigError: a setting cannot be used.
    """
    folder, observer = Path(out), observer or Observer()
    whole = artifact if isinstance(artifact, Artifact) else _read(Path(artifact))
    chosen = _method_of(method, overrides)
    material = read_material(data, seed)
    shape = _input_shape(whole, material)
    module = whole.module()
    where = torch.device(device)
    mean, std, inner = _unwrapped(module)
    inputs = InputSpace(
        mean, std, len(shape) == 3 if material.is_image is None else material.is_image, material.augment
    )
    num_classes = _num_classes(whole, module, shape)
    name, settings = _named(student, "student", "family")
    spec = models.spec(name, settings, input_shape=shape, num_classes=num_classes, seed=derive_seed(seed, "model"))
    facts: dict[str, Any] = {}
    server = None if material.inputs is None else unlabelled(inputs.normalize(material.inputs))
    question = [VERSION, whole.digest(), chosen.name, to_json(chosen), spec.digest, seed, threads, device, str(inputs)]
    question += [None if server is None else server.fingerprint]
    job = Job(
        model=spec,
        server_data=server,
        rng=Rng(derive_seed(seed, "server")),
        device=where,
        progress=observer.server,
        facts=facts,
        inputs=inputs,
        checkpoints=Checkpoints(
            folder / "checkpoints", hashlib.sha256(json.dumps(question, sort_keys=True).encode()).hexdigest()
        ),
        picture=lambda title, images: _keep_picture(folder, title, images),
    )
    with fixed_threads(threads), job.rng.ambient("distil"):
        made = chosen.distil(_teachers(inner, where), job)
        if mean:
            made = normalized_artifact(made, mean, std, len(shape))
        info = {
            **{key: value for key, value in whole.info.items() if key in ("class_names", "uploads")},
            "method": chosen.name,
            "input_shape": list(shape),
            "distilled_from": whole.digest(),
            "fedfuse": VERSION,
        }
        made = Artifact(made.recipe, made.state, made.template, info)
        result = _measured(whole, made, material.held_out, folder, where, tuple(facts.get("notes", ())))
    made.save(folder / "artifact")
    # Written last: a folder with these facts is complete.
    write_atomically(folder / "distilled.json", json.dumps(result.facts, indent=1, sort_keys=True).encode())
    job.checkpoints.clear()
    return result


def read_material(data: Any, seed: int = 0) -> Material:
    """What there is to learn on and to measure with.

    Args:
        data: see :func:`distill`.
        seed: of the configuration's partition, where the server's part is held out.

    Raises:
        ConfigError: the data is neither a file nor a source.
        DataError: it cannot be read.
    """
    if data is None:
        return Material()
    if isinstance(data, Path) or (isinstance(data, str) and data.endswith((".yaml", ".yml"))):
        federated = Loader(read_config(data)).setting(seed).data
        normalization = federated.normalization
        space = InputSpace(normalization.mean, normalization.std, federated.is_pixels)
        augment = next(iter(federated.clients.values())).augment if federated.clients else "none"
        test = None if federated.test is None else Examples(space.restore(federated.test.x), federated.test.y)
        server = None if federated.server is None else space.restore(federated.server.x)
        return Material(server, test, federated.is_pixels, augment)
    if isinstance(data, str):
        name, settings = _named(data, "data", "source")
        limits = {key: settings.pop(key, None) for key in ("limit", "test_limit")}
        loaded = named(SOURCES, name, settings, "data", "source", *limits).load(**limits).limited(**limits)
        return Material(loaded.train.x, loaded.test, loaded.is_image)
    own = server_inputs(data)
    return Material(own.x, None, bool(own.x.ndim == 4 and own.x.min() >= 0 and own.x.max() <= 1))


def _named(text: str | Mapping[str, Any], where: str, key: str) -> tuple[str, dict[str, Any]]:
    """Name and settings of ``name[setting=value,...]`` or of ``{key: name, setting: value}``."""
    if not isinstance(text, str):
        settings = dict(text)
        name = settings.pop(key, None)
        if not isinstance(name, str):
            raise ConfigError(f"the {where} has no {key}", where=where, fix=f"write {{{key}: name, setting: value}}")
        return name, settings
    name, bracket, rest = text.strip().partition("[")
    if bracket and not rest.endswith("]"):
        raise ConfigError(f'"{text}" lacks its closing bracket', where=where, fix="write name[key=value,...]")
    settings = {}
    for part in split_outside_brackets(rest.removesuffix("]")):
        settings = override(settings, part, where=where)
    return name.strip(), settings


def _method_of(method: str | Mapping[str, Any] | Distilling, overrides: Sequence[str]) -> Distilling:
    if isinstance(method, Distilling):
        chosen: Any = method
    else:
        name, settings = _named(method, "method", "name")
        for text in overrides:
            settings = override(settings, text)
        chosen = named(METHODS, name, settings, "method", "name")
    if not isinstance(chosen, Distilling) or type(chosen).distil is Distilling.distil:
        known = ", ".join(distillers())
        raise ConfigError(f'the method "{chosen.name}" distils no models', where="method", fix=f"use one of {known}")
    if getattr(chosen, "result", "student") != "student":
        raise ConfigError(
            f"the result of {chosen.name} is no student but {chosen.result}",  # type: ignore[attr-defined]
            where="method.result",
            fix="use result: student",
        )
    if chosen.student:
        raise ConfigError("the student is given twice", where="method.student", fix="give it once, beside the method")
    return chosen


def distillers() -> list[str]:
    """Names of the methods that can turn an artifact into a student."""
    found = []
    for name in METHODS.names():
        kind = METHODS.get(name)
        if issubclass(kind, Distilling) and kind.distil is not Distilling.distil:
            found.append(name)
    return found


def _read(folder: Path) -> Artifact:
    if not (folder / "fused.json").exists() and (folder / "artifact" / "fused.json").exists():
        folder = folder / "artifact"
    return Artifact.read(folder)


def _input_shape(artifact: Artifact, material: Material) -> tuple[int, ...]:
    said = artifact.info.get("input_shape")
    seen = [
        part
        for part in (material.inputs, None if material.held_out is None else material.held_out.x)
        if part is not None
    ]
    if not said and not seen:
        raise ArtifactError(_NO_SHAPE, where="artifact", fix="give data, or distil an artifact of a run")
    shape = tuple(said) if said else tuple(seen[0].shape[1:])
    for part in seen:
        if tuple(part.shape[1:]) != shape:
            raise DataError(
                f"the data has inputs of shape {tuple(part.shape[1:])}, and the artifact takes {shape}",
                where="data",
                fix="give data of the kind that the artifact was made for",
            )
    return shape


def _num_classes(artifact: Artifact, module: nn.Module, shape: tuple[int, ...]) -> int:
    names = artifact.info.get("class_names")
    return len(names) if names else int(predict(module, torch.zeros(2, *shape)).shape[1])


def _unwrapped(module: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...], nn.Module]:
    """The normalisation in front of a model, and the model behind it, so that teacher and student both learn there."""
    if isinstance(module, Normalized):
        return tuple(module.mean.flatten().tolist()), tuple(module.std.flatten().tolist()), module.inner
    return (), (), module


def _teachers(module: nn.Module, device: torch.device) -> Teachers:
    if isinstance(module, Ensemble) and module.combine == "mean_logits":
        shares = module.weights[:, 0]
        # Weights that differ from class to class are no mean of the members.
        if bool((module.weights == shares[:, None]).all()):
            return Teachers(list(module.members), device=device, weights=shares.clone(), recipes=module.recipes)
    return Teachers([module], device=device)


def _measured(
    teacher: Artifact,
    student: Artifact,
    held_out: Examples | None,
    folder: Path,
    device: torch.device,
    notes: tuple[str, ...],
) -> Distilled:
    agreement = teacher_accuracy = student_accuracy = None
    if held_out is not None:
        theirs, ours = (predict(net.module(), held_out.x, device=device) for net in (teacher, student))
        agreement = (theirs.argmax(1) == ours.argmax(1)).double().mean().item()
        if int(held_out.y.min()) >= 0:
            teacher_accuracy, student_accuracy = (score(logits, held_out.y).accuracy for logits in (theirs, ours))
    return Distilled(
        folder,
        student,
        teacher.num_bytes,
        student.num_bytes,
        agreement,
        teacher_accuracy,
        student_accuracy,
        0 if held_out is None else len(held_out),
        notes,
    )


def _keep_picture(folder: Path, name: str, images: Tensor) -> None:
    pixels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    write_atomically(folder / "pictures" / f"{name}.safetensors", Payload({"images": pixels}).encode())
