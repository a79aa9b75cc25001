"""One method on one federation: ask, fuse, score once on the test set, write the run's folder."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from fedfuse.analysis import Screening
from fedfuse.core import VERSION
from fedfuse.core.artifact import Artifact
from fedfuse.core.checkpoints import Checkpoints
from fedfuse.core.client import ClientSide, StateStore, fixed_threads, peak_rss_bytes, reset_peak_rss
from fedfuse.core.cohort import Cohort, Runtime, Terms
from fedfuse.core.errors import ConfigError
from fedfuse.core.files import remove_unfinished, write_atomically
from fedfuse.core.journal import Journal
from fedfuse.core.judging import Sheet
from fedfuse.core.ledger import Ledger
from fedfuse.core.method import Fused, Method
from fedfuse.core.payload import Payload
from fedfuse.core.registry import METHODS, RUNTIMES
from fedfuse.core.seeding import Rng, derive_seed
from fedfuse.core.settings import to_json
from fedfuse.data.labels import LabelSetting
from fedfuse.experiment.compressing import in_words, resolved_upload
from fedfuse.experiment.configuration import (
    Config,
    ConfigLike,
    NamedSection,
    named,
    read_config,
    resolve,
    server_threads,
)
from fedfuse.experiment.hostility import attack_facts, with_hostile_clients
from fedfuse.experiment.private import client_secret, releases_for, resolved_privacy, run_secret
from fedfuse.experiment.result import Observer, Result
from fedfuse.experiment.scoring import score_result
from fedfuse.experiment.setting import Loader, Setting, own_setting
from fedfuse.experiment.watching import WatchedCohort, WatchedJob
from fedfuse.models.normalized import normalized_artifact
from fedfuse.training.memory import keep_freed_memory


def run(
    config: ConfigLike | None = None,
    *,
    overrides: Sequence[str] = (),
    model: nn.Module | Callable[[], nn.Module] | None = None,
    clients: Sequence[Any] | Mapping[str, Any] | None = None,
    test: Any = None,
    method: Method | str | None = None,
    runtime: Mapping[str, Any] | None = None,
    federation: Mapping[str, Any] | None = None,
    privacy: Mapping[str, Any] | None = None,
    upload: Mapping[str, Any] | None = None,
    validation_fraction: float = 0.1,
    server_data: Any = None,
    class_names: Sequence[str] | None = None,
    labels: LabelSetting | None = None,
    resize: int | None = None,
    seed: int | None = None,
    out: str | Path | None = None,
    observer: Observer | None = None,
) -> Result:
    """Run one method: from a configuration, or on a model and data of one's own.

    Args:
        config: a YAML file or a table; or else ``model`` and ``clients`` are given.
        overrides: ``section.key=value``, as ``--set`` takes them.
        model: a module (its weights are where everyone starts) or a function that makes one.
        clients: one data set per client, by position or by id: ``torch.utils.data.Dataset``, Hugging Face ``Dataset``,
            or a pair of arrays ``(x, y)``.
        test: a data set of the same kind; without it the result has no accuracy.
        method: a method object or a name; FuseFL if left out.
        runtime: ``{"name": "local", ...}``.
        federation: ``{"quorum": ..., "timeout_s": ...}``.
        privacy: ``{"clip_norm": ..., "epsilon": ..., ...}``: what becomes of uploads before they leave their clients.
        upload: ``{"codec": "int8", ...}``: how uploads are said in fewer bytes.
        validation_fraction: part of each client's data that is set apart, for data of one's own.
        server_data: data of the server's own, for methods that use some: a tensor or array of inputs, or any kind that
            ``clients`` takes, whose labels are left out. No row of it may be in the test part.
        class_names: name of each class, for data of one's own; labels may then be texts.
        labels: for clients whose labels differ: own name of a class to its name in ``class_names``, or under a
            client's id a table of that client's own; numbers count as their digits.
        resize: side in pixels that all images of one's own are brought to.
        seed: instead of the configuration's.
        out: the run's folder; without it a run with data of one's own stays in memory.
        observer: hears how far the run is.

    Returns:
        The result.

    Raises:
        ConfigError: what is given cannot be run.
    """
    if config is not None:
        if class_names is not None or labels is not None or resize is not None:
            raise ConfigError(
                "class_names, labels and resize are for data of one's own",
                where="fedfuse.run",
                fix="set data.labels and data.resize in the configuration",
            )
        checked = read_config(config, [*overrides, *([] if seed is None else [f"seed={seed}"])])
    else:
        sections = {"runtime": runtime, "federation": federation, "privacy": privacy, "upload": upload}
        table = {"data": {"source": "own"}, "model": {"family": "own"}, "seed": seed or 0}
        checked = read_config({**table, **{key: dict(value) for key, value in sections.items() if value}})
    if isinstance(method, str):
        checked = checked.model_copy(update={"method": NamedSection(name=method)})
    elif method is not None:
        checked = checked.model_copy(update={"method": NamedSection(name=method.name, **to_json(method))})
    if config is not None:
        resolved = resolve(checked)
        if server_data is not None:
            resolved["data"]["server"] = {"source": "own", "labelled": False}
        setting = Loader(checked, server_data).setting(checked.seed)
    else:
        setting = own_setting(
            model,
            clients,
            test,
            seed=checked.seed,
            validation_fraction=validation_fraction,
            server_data=server_data,
            class_names=class_names,
            labels=labels,
            resize=resize,
        )
        resolved = _own_config(checked, model, validation_fraction, server_data is not None)
    return run_method(
        setting,
        method if isinstance(method, Method) else named(METHODS, checked.method.name, checked.method.others, "method"),
        checked,
        resolved,
        label=checked.method.name,
        folder=None if out is None else Path(out),
        observer=observer or Observer(),
    )


def _own_config(config: Config, model: Any, validation_fraction: float, has_server_data: bool) -> dict[str, Any]:
    """What can be written down of a run on a model and data of the user's own."""
    name = type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "own")
    method = named(METHODS, config.method.name, config.method.others, "method")
    runtime = named(RUNTIMES, config.runtime.name, config.runtime.others, "runtime")
    return {
        "seed": config.seed,
        "data": {
            "source": "own",
            "validation_fraction": validation_fraction,
            "server": {"source": "own"} if has_server_data else None,
        },
        "model": {"family": "own", "name": name},
        "method": {"name": config.method.name, **to_json(method)},
        "runtime": {"name": config.runtime.name, **to_json(runtime)},
        "federation": config.federation.model_dump(),
        "server": {**config.server.model_dump(), "threads": server_threads(config)},
        **resolved_privacy(config),
        **resolved_upload(config),
    }


def run_method(
    setting: Setting,
    method: Method,
    config: Config,
    resolved: Mapping[str, Any],
    *,
    label: str,
    folder: Path | None,
    observer: Observer,
    shared: Path | None = None,
    seed: int | None = None,
    runtime: Runtime | None = None,
) -> Result:
    """Run a method on prepared data and write the run's folder.

    ``shared`` holds the journal of a comparison, so that methods that ask the same question share the answer.
    ``runtime`` is one that is open already, to clients that are elsewhere; left out, the configuration's is opened.
    """
    keep_freed_memory()
    seed = config.seed if seed is None else seed
    data, home = setting.data, shared or folder
    ledger, lines = Ledger(), []
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(None if home is None else home / "journal"))
        for place in {home, folder} - {None}:
            # The journal is locked: nobody else writes here.
            remove_unfinished(Path(str(place)))
        if folder is not None:
            write_atomically(folder / "config.yaml", yaml.safe_dump(dict(resolved), sort_keys=False).encode())
        is_simulation = runtime is None
        secret = run_secret(config, home, is_simulation=is_simulation)
        releases = releases_for(config, method, seed, secret, is_simulation=is_simulation)
        codec = resolved_upload(config).get("upload", {})
        if runtime is None:
            # Worker processes share clients' states through files, also where the run itself leaves none.
            scratch = None if home else stack.enter_context(tempfile.TemporaryDirectory(prefix="fedfuse-"))
            runtime = _open_runtime(setting, config, StateStore((home or Path(str(scratch))) / "clients"), secret)
            stack.callback(runtime.close)
        job = WatchedJob(
            model=setting.model,
            client_models=setting.client_models,
            server_data=data.server,
            rng=Rng(derive_seed(seed, "server")),
            device=_server_device(config),
            progress=observer.server,
            inputs=data.inputs,
            checkpoints=_checkpoints(folder, method, config, resolved, seed),
            picture=_Pictures(folder),
        )
        cohort = WatchedCohort(
            screening=Screening(job.model_of),
            tell=observer.note,
            runtime=runtime,
            method=method,
            model_of=job.model_of,
            seed=seed,
            journal=journal,
            ledger=ledger,
            releases=releases,
            codec=codec,
            terms=Terms(**{f.name: getattr(config.federation, f.name) for f in fields(Terms)}),
            log=lambda facts: lines.append(dict(facts)),
            progress=observer.exchange,
        )
        stack.enter_context(fixed_threads(server_threads(config)))
        if codec:
            job.note(in_words(codec))
        reset_peak_rss()
        start = time.perf_counter()
        try:
            with job.rng.ambient("fuse"):
                fused = method.fuse(cohort, job)
            if config.federation.late == "record" or not (method.is_additive or len(cohort.uploads) == 1):
                # Whoever fuses late uploads in takes them from the runtime himself.
                cohort.collect_late()
        finally:
            _write_progress(folder, ledger, lines)
        wall_seconds = time.perf_counter() - start
        job.checkpoints.clear()
        for key in journal.broken:
            observer.note(f"the journal's entry {key[:8]} was damaged and was asked for again")
        result = _judge(setting, fused, cohort, job, label, resolved, seed, folder, wall_seconds)
    if folder is not None:
        _write_run(folder, result, ledger)
    observer.run_ended(result)
    return result


def _open_runtime(setting: Setting, config: Config, states: StateStore, secret: bytes) -> Runtime:
    """The configuration's runtime, with every client of the setting on this machine."""
    settings = named(RUNTIMES, config.runtime.name, config.runtime.others, "runtime")
    device = settings.client_device() if hasattr(settings, "client_device") else torch.device("cpu")
    sides = {
        client_id: ClientSide(
            client_id,
            client_data,
            setting.client_models.get(client_id, setting.model),
            device,
            getattr(settings, "client_threads", 1),
            states,
            client_secret(secret, client_id),
        )
        for client_id, client_data in setting.data.clients.items()
    }
    runtime: Runtime = settings.open(sides)
    return with_hostile_clients(runtime, setting.hostile, lambda client_id: sides[client_id].model)


def _judge(
    setting: Setting,
    fused: Fused,
    cohort: WatchedCohort,
    job: WatchedJob,
    label: str,
    resolved: Mapping[str, Any],
    seed: int,
    folder: Path | None,
    wall_seconds: float,
) -> Result:
    """Score what came out on the test set, once, and put everything into one table."""
    data = setting.data
    scores = score_result(fused, data, cohort.facts, job.device)
    seen = scores.fused
    for name, sheet in ({} if seen is None else seen.pictures).items():
        _Pictures(folder).hang(name, sheet, data.class_names)
    artifact, personal = _shipped(setting, fused, cohort, label)
    first = artifact or next(iter(personal.values()), None)
    sizes = [a.num_bytes for a in ([artifact] if artifact else personal.values())]
    totals = cohort.ledger.totals(sum(sizes))
    totals["wall_seconds"] = wall_seconds
    totals["server_seconds"] = wall_seconds - cohort.waited_s
    totals["peak_rss_bytes"] = max(cohort.ledger.peak_client_rss_bytes, peak_rss_bytes())
    facts = {
        "method": label,
        "accuracy": scores.accuracy,
        "loss": None if seen is None else seen.loss,
        "seed": seed,
        "class_names": list(data.class_names),
        "confusion": None if seen is None or seen.confusion is None else seen.confusion.tolist(),
        "metrics": dict(scores.metrics),
        "clients": scores.clients,
        "ledger": totals,
        "missing": dict(cohort.missing),
        "artifact": None
        if first is None
        else {
            "digest": artifact.digest() if artifact else _digest_of(personal),
            "num_parameters": sum(p.numel() for p in first.module().parameters()),
            "num_bytes": sum(sizes),
            "path": "artifact",
        },
        "facts": dict(job.facts),
        "used_server_data": job.used_server_data,
        "suspects": [suspect.to_json() for suspect in cohort.screening.suspects],
        "uploads": cohort.uploads,
        "privacy": cohort.releases.guarantee(),
        "versions": versions(),
        "config": dict(resolved),
    }
    if setting.hostile is not None:
        artifacts = [fused.model] if fused.model is not None else list(fused.personal.values())
        models = [fitted.module() for fitted in artifacts]
        facts["attack"] = attack_facts(setting.hostile, models, data, job.device)
    return Result(
        label, scores.accuracy, scores.clients, totals, artifact, personal, dict(cohort.missing), facts, folder
    )


def _shipped(setting: Setting, fused: Fused, cohort: Cohort, label: str) -> tuple[Artifact | None, dict[str, Artifact]]:
    """The artifacts as they are shipped: they take inputs as the source gives them and say where they come from."""
    data = setting.data
    info = {
        "method": label,
        "class_names": list(data.class_names),
        "input_shape": list(data.input_shape),
        "uploads": cohort.uploads,
        "privacy": cohort.releases.guarantee(),
        "fedfuse": VERSION,
    }

    def ship(artifact: Artifact) -> Artifact:
        normalization = data.normalization
        if normalization.mean:
            artifact = normalized_artifact(artifact, normalization.mean, normalization.std, len(data.input_shape))
        return Artifact(artifact.recipe, artifact.state, artifact.template, info)

    personal = {client_id: ship(artifact) for client_id, artifact in sorted(fused.personal.items())}
    return None if fused.model is None else ship(fused.model), personal


def _digest_of(personal: Mapping[str, Artifact]) -> str:
    text = json.dumps({client_id: artifact.digest() for client_id, artifact in personal.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _checkpoints(
    folder: Path | None, method: Method, config: Config, resolved: Mapping[str, Any], seed: int
) -> Checkpoints:
    own = [method.name, to_json(method), resolved.get("data"), resolved.get("model")]
    facts = [VERSION, *own, server_threads(config), str(_server_device(config)), seed]
    question = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    return Checkpoints(None if folder is None else folder / "checkpoints", question)


@dataclass(frozen=True)
class _Pictures:
    """Writes images for the report to draw; drawing itself is the report's."""

    folder: Path | None

    def __call__(self, name: str, images: Tensor) -> None:
        if self.folder is not None:
            self._write(name, Payload({"images": _bytes(images)}))

    def hang(self, name: str, sheet: Sheet, class_names: Sequence[str]) -> None:
        """Write a sheet, with the name of the class of each line."""
        if self.folder is not None:
            lines = json.dumps([class_names[number] for number in sheet.classes])
            self._write(name, Payload({"images": _bytes(sheet.drawings.flatten(0, 1)), "lines": lines}))

    def _write(self, name: str, content: Payload) -> None:
        write_atomically(Path(str(self.folder)) / "pictures" / f"{name}.safetensors", content.encode())


def _bytes(images: Tensor) -> Tensor:
    return (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def _server_device(config: Config) -> torch.device:
    if config.server.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device", where="server.device", fix="use device: cpu or auto")
    return torch.device("cuda" if config.server.device != "cpu" and torch.cuda.is_available() else "cpu")


def _write_progress(folder: Path | None, ledger: Ledger, lines: Sequence[Mapping[str, Any]]) -> None:
    if folder is not None:
        text = "".join(json.dumps(line, sort_keys=True) + "\n" for line in lines)
        write_atomically(folder / "metrics.jsonl", text.encode())
        write_atomically(folder / "ledger.json", json.dumps(ledger.to_json(), indent=1).encode())


def _write_run(folder: Path, result: Result, ledger: Ledger) -> None:
    if result.artifact is not None:
        result.artifact.save(folder / "artifact")
    for client_id, artifact in result.personal.items():
        artifact.save(folder / "artifact" / client_id)
    # Written last: a run's folder with a result is complete.
    write_atomically(folder / "result.json", json.dumps(result.facts, indent=1, sort_keys=True).encode())


def versions() -> dict[str, str]:
    """What the run was made with: fedfuse, its git commit if it runs from a checkout, python, torch, numpy, system."""
    found = {
        "fedfuse": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }
    here = Path(__file__).resolve().parent
    try:
        git = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=True
        )
        found["git"] = git.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        pass
    return found
