"""Where a configuration becomes objects, and objects become a run: the only place that knows YAML."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pydantic
import torch
import yaml

from fedfuse.core import VERSION
from fedfuse.core.artifact import Artifact, ModelSpec
from fedfuse.core.client import ClientSide, StateStore, fixed_threads, peak_rss_bytes, reset_peak_rss
from fedfuse.core.cohort import Cohort, Terms
from fedfuse.core.errors import ConfigError, did_you_mean
from fedfuse.core.files import write_atomically
from fedfuse.core.journal import Journal
from fedfuse.core.ledger import Ledger
from fedfuse.core.method import Fused, Job, Method
from fedfuse.core.registry import METHODS, PARTITIONS, RUNTIMES, SOURCES
from fedfuse.core.seeding import Rng, derive_seed
from fedfuse.core.settings import config_error, from_json, to_json
from fedfuse.training.evaluation import evaluate

if TYPE_CHECKING:
    from torch import nn

    from fedfuse.data.dataset import Dataset
    from fedfuse.data.federate import FederatedData


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class _OpenSection(pydantic.BaseModel):
    """A section whose other keys are the settings of what it names."""

    model_config = pydantic.ConfigDict(frozen=True, extra="allow")

    @property
    def others(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class DataSection(_OpenSection):
    """``data``: a source and its settings, and how its examples are split over clients.

    Args:
        source: name in the registry of sources.
        partition: ``scheme`` and its settings.
        limit: use the first training rows only; ``None`` is all.
        test_limit: use the first test rows only; ``None`` is all.
        validation_fraction: part of each client's training data that is set apart, in [0, 1).
        normalize: ``auto``, ``none``, or ``{mean: [...], std: [...]}``.
        augment: name of an augmentation, ``none`` or ``auto``.
    """

    source: str
    partition: dict[str, Any] = pydantic.Field(default_factory=lambda: {"scheme": "iid", "num_clients": 5})
    limit: pydantic.PositiveInt | None = None
    test_limit: pydantic.PositiveInt | None = None
    validation_fraction: float = pydantic.Field(0.1, ge=0, lt=1)
    normalize: str | dict[str, list[float]] = "auto"
    augment: str = "auto"


class ModelSection(_OpenSection):
    """``model``: a family and its settings; ``clients`` gives single clients a model of their own.

    Args:
        family: name in the registry of models.
        clients: client id to the settings that differ for it; may name another family.
    """

    family: str = "cnn"
    clients: dict[str, dict[str, Any]] = pydantic.Field(default_factory=dict)


class NamedSection(_OpenSection):
    """``method`` and ``runtime``: a name in a registry and its settings.

    Args:
        name: the registry key.
    """

    name: str


class FederationSection(_Section):
    """``federation``: what the operator decides about every exchange.

    Args:
        quorum: fraction of the clients that must answer, in (0, 1].
        timeout_s: most seconds that one client may take; ``None`` is no limit.
        max_upload_bytes: uploads above are refused.
    """

    quorum: float = pydantic.Field(1.0, gt=0, le=1)
    timeout_s: pydantic.PositiveFloat | None = None
    max_upload_bytes: pydantic.PositiveInt = 4 << 30


class ServerSection(_Section):
    """``server``: how the server computes.

    Args:
        threads: torch threads; ``None`` is one per core and is written into the run's configuration, because the
            number changes bits.
        device: ``cpu``, ``cuda`` or ``auto``.
    """

    threads: pydantic.PositiveInt | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Config(_Section):
    """A whole configuration; see the sections.

    Args:
        seed: decides every random choice of the run.
        data: where examples come from and who holds what.
        model: what clients own.
        method: how their uploads are fused.
        runtime: what carries requests to clients.
        federation: the operator's decisions.
        server: how the server computes.
        methods: for ``compare``: names, or tables like ``method`` with an optional ``label``.
    """

    seed: int = 0
    data: DataSection
    model: ModelSection = pydantic.Field(default_factory=ModelSection)
    method: NamedSection = pydantic.Field(default_factory=lambda: NamedSection(name="fusefl"))
    runtime: NamedSection = pydantic.Field(default_factory=lambda: NamedSection(name="local"))
    federation: FederationSection = pydantic.Field(default_factory=lambda: FederationSection.model_validate({}))
    server: ServerSection = pydantic.Field(default_factory=lambda: ServerSection())
    methods: list[str | dict[str, Any]] = pydantic.Field(default_factory=list)


ConfigLike = str | Path | Mapping[str, Any] | Config


class Observer:
    """Hears how far a run is; the default is silent."""

    def run_started(self, label: str, seed: int, position: int, total: int) -> None:
        """A run of a comparison begins.

        Args:
            label: the method's label.
            seed: the run's seed.
            position: 1 to total.
            total: runs in all.
        """

    def exchange(self, key: str, client_id: str, done: int, total: int, fraction: float) -> None:
        """A client is somewhere in an exchange.

        Args:
            key: the exchange.
            client_id: the client; empty at the exchange's start.
            done: clients that are done.
            total: clients asked.
            fraction: of this client's work.
        """

    def server(self, what: str, done: int, total: int) -> None:
        """The server is somewhere in its own work.

        Args:
            what: a few words.
            done: steps done.
            total: steps in all.
        """

    def run_ended(self, result: Result) -> None:
        """A run is complete.

        Args:
            result: what came out.
        """

    def note(self, text: str) -> None:
        """Something the reader should know.

        Args:
            text: one sentence.
        """


@dataclass(frozen=True)
class Result:
    """What came out of a run.

    Args:
        method: the method's label.
        accuracy: on the test set, in [0, 1]; the mean over clients where every client has a model of its own;
            ``None`` without a test set.
        clients: client id to what is known of it: examples, label counts, accuracy.
        ledger: sums of bytes, seconds and memory.
        artifact: the fused model; ``None`` where there is none.
        personal: client id to its own model, where the method gives one.
        missing: client id to the reason why it did not answer.
        facts: everything that ``result.json`` holds.
        folder: the run's folder; ``None`` for a run in memory.
    """

    method: str
    accuracy: float | None
    clients: Mapping[str, Mapping[str, Any]]
    ledger: Mapping[str, Any]
    artifact: Artifact | None
    personal: Mapping[str, Artifact]
    missing: Mapping[str, str]
    facts: Mapping[str, Any]
    folder: Path | None = None

    def module(self) -> nn.Module:
        """The fused model, working, in evaluation mode.

        Raises:
            ConfigError: the method gives no common model.
        """
        if self.artifact is None:
            raise ConfigError(f'the method "{self.method}" gives no common model', fix="look at result.personal")
        return self.artifact.module()


@dataclass(frozen=True)
class Setting:
    """The objects of one run before its method: who holds what, with which model.

    Args:
        data: the clients' data and the test set.
        model: the common model.
        client_models: client id to a model of its own.
    """

    data: FederatedData
    model: ModelSpec
    client_models: Mapping[str, ModelSpec] = field(default_factory=dict)


def read_config(config: ConfigLike, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration and check its sections.

    Args:
        config: a YAML file, a table, or a configuration.
        overrides: ``section.key=value`` with a YAML value, later ones win.

    Returns:
        The configuration. Names and settings are checked by :func:`resolve`.

    Raises:
        ConfigError: it cannot be read, or a key is unknown, missing or wrong.
    """
    if isinstance(config, Config):
        table: Any = config.model_dump()
    elif isinstance(config, Mapping):
        table = dict(config)
    else:
        try:
            text = Path(config).read_text(encoding="utf-8")
            table = yaml.safe_load(text)
        except OSError as error:
            raise ConfigError(
                f"cannot read the configuration: {error.strerror}", where=str(config), fix="name a YAML file"
            ) from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"the configuration is not YAML: {' '.join(str(error).split())}",
                where=str(config),
                fix="mend the place that is named",
            ) from None
    if not isinstance(table, dict):
        raise ConfigError(
            "the configuration is no table", where=str(config)[:80], fix="begin with: data: {source: digits}"
        )
    for override in overrides:
        table = _override(table, override)
    try:
        return Config.model_validate(table)
    except pydantic.ValidationError as error:
        mended = config_error(error, Config, "config")
        mended.where = mended.where.removeprefix("config.")
        raise mended from None


def _override(table: dict[str, Any], override: str) -> dict[str, Any]:
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f'"{override}" is no setting', where="--set", fix="write --set section.key=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise ConfigError(f'"{text}" is no YAML value', where=f"--set {path}", fix="quote it") from None
    return _put(table, path.strip().split("."), value)


def _put(table: Any, path: Sequence[str], value: Any) -> dict[str, Any]:
    inner: dict[str, Any] = dict(table) if isinstance(table, Mapping) else {}
    inner[path[0]] = value if len(path) == 1 else _put(inner.get(path[0]), path[1:], value)
    return inner


def resolve(config: Config) -> dict[str, Any]:
    """The whole configuration with every default filled in; running it again repeats the run.

    Args:
        config: checked by section.

    Returns:
        Plain tables.

    Raises:
        ConfigError: a setting of what a section names is unknown or wrong.
    """
    data, model, runtime = config.data, config.model, config.runtime
    source = _named(SOURCES, data.source, data.others, "data", also=set(DataSection.model_fields))
    scheme = dict(data.partition)
    name = scheme.pop("scheme", None)
    if not isinstance(name, str):
        raise ConfigError(
            'the setting "scheme" is missing',
            where="data.partition.scheme",
            fix=f"known: {', '.join(PARTITIONS.names())}",
        )
    partition = _named(PARTITIONS, name, scheme, "data.partition")
    from fedfuse import models

    family = to_json(models.family(model.family, model.others))
    for client_id, others in model.clients.items():
        _client_family(model, client_id, others)
    method = _named(METHODS, config.method.name, config.method.others, "method")
    return {
        "seed": config.seed,
        "data": {
            "source": data.source,
            **to_json(source),
            **data.model_dump(include=set(DataSection.model_fields) - {"source", "partition"}),
            "partition": {"scheme": name, **to_json(partition)},
        },
        "model": {"family": model.family, **family, "clients": model.clients},
        "method": {"name": config.method.name, **to_json(method)},
        "runtime": {"name": runtime.name, **to_json(_named(RUNTIMES, runtime.name, runtime.others, "runtime"))},
        "federation": config.federation.model_dump(),
        "server": {**config.server.model_dump(), "threads": _server_threads(config)},
    }


def _named(registry: Any, name: str, others: Mapping[str, Any], where: str, also: set[str] = frozenset()) -> Any:  # type: ignore[assignment]
    kind = registry.get(name)
    known = {f for f in getattr(kind, "__dataclass_fields__", {})}
    for key in others:
        if key not in known:
            raise ConfigError(f'unknown setting "{key}"', where=f"{where}.{key}", fix=did_you_mean(key, known | also))
    return from_json(kind, others, where=where)


def _server_threads(config: Config) -> int:
    return config.server.threads or os.cpu_count() or 1


def _client_family(model: ModelSection, client_id: str, others: Mapping[str, Any]) -> tuple[str, Any]:
    from fedfuse import models

    changed = dict(others)
    name = str(changed.pop("family", model.family))
    base = model.others if name == model.family else {}
    return name, models.family(name, {**base, **changed})


class _Loader:
    """Loads a data set once for all seeds and methods of a comparison."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._dataset: Dataset | None = None

    def dataset(self) -> Dataset:
        if self._dataset is None:
            data = self.config.data
            source = _named(SOURCES, data.source, data.others, "data", also=set(DataSection.model_fields))
            loaded = source.load(limit=data.limit, test_limit=data.test_limit)
            self._dataset = loaded.limited(data.limit, data.test_limit)
        return self._dataset

    def setting(self, seed: int) -> Setting:
        from fedfuse import models
        from fedfuse.data.federate import federate

        config, dataset = self.config, self.dataset()
        scheme = dict(config.data.partition)
        partition = _named(PARTITIONS, scheme.pop("scheme"), scheme, "data.partition")
        data = federate(
            dataset,
            partition,
            seed=seed,
            validation_fraction=config.data.validation_fraction,
            normalize=config.data.normalize,
            augment=config.data.augment,
        )
        facts: dict[str, Any] = {
            "input_shape": data.input_shape,
            "num_classes": data.num_classes,
            "seed": derive_seed(seed, "model"),
        }
        spec = models.spec(config.model.family, config.model.others, **facts)
        own: dict[str, ModelSpec] = {}
        for client_id, others in config.model.clients.items():
            if client_id not in data.clients:
                raise ConfigError(
                    f'there is no client "{client_id}"',
                    where=f"model.clients.{client_id}",
                    fix=did_you_mean(client_id, data.clients),
                )
            name, family = _client_family(config.model, client_id, others)
            own[client_id] = models.spec(name, to_json(family), **facts)
        return Setting(data, spec, own)


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
    validation_fraction: float = 0.1,
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
        validation_fraction: part of each client's data that is set apart, for data of one's own.
        seed: instead of the configuration's.
        out: the run's folder; without it a run with data of one's own stays in memory.
        observer: hears how far the run is.

    Returns:
        The result.

    Raises:
        ConfigError: what is given cannot be run.
    """
    if config is not None:
        checked = read_config(config, [*overrides, *([] if seed is None else [f"seed={seed}"])])
        if method is not None:
            chosen = method if isinstance(method, str) else None
            section = {"name": chosen} if chosen else {"name": method.name, **to_json(method)}  # type: ignore[union-attr]
            checked = checked.model_copy(update={"method": NamedSection(**section)})
        resolved = resolve(checked)
        setting = _Loader(checked).setting(checked.seed)
    else:
        setting, checked, resolved = _own_setting(
            model, clients, test, method, runtime, federation, validation_fraction, seed or 0
        )
    chosen_method = _named(METHODS, checked.method.name, checked.method.others, "method")
    if isinstance(method, Method):
        chosen_method = method
    return _run(
        setting,
        chosen_method,
        checked,
        resolved,
        label=checked.method.name,
        folder=None if out is None else Path(out),
        observer=observer or Observer(),
    )


def _own_setting(
    model: Any,
    clients: Any,
    test: Any,
    method: Method | str | None,
    runtime: Mapping[str, Any] | None,
    federation: Mapping[str, Any] | None,
    validation_fraction: float,
    seed: int,
) -> tuple[Setting, Config, dict[str, Any]]:
    from fedfuse.data.federate import from_clients
    from fedfuse.data.from_python import from_python
    from fedfuse.models.graph import user_spec

    if model is None or clients is None:
        raise ConfigError(
            "there is nothing to run", where="fedfuse.run", fix="give a configuration, or model= and clients="
        )
    pairs = clients.items() if isinstance(clients, Mapping) else clients
    if isinstance(clients, Mapping):
        parts: Any = {str(client_id): from_python(part) for client_id, part in pairs}
    else:
        parts = [from_python(part) for part in pairs]
    tested = None if test is None else from_python(test)
    # Data of one's own is taken as it is: it comes ready for the model that comes with it.
    data = from_clients(
        parts, tested, seed=seed, validation_fraction=validation_fraction, normalize="none", augment="none"
    )
    spec = user_spec(model, input_shape=data.input_shape, num_classes=data.num_classes, seed=derive_seed(seed, "model"))
    name = method if isinstance(method, str) else "fusefl" if method is None else method.name
    settings = to_json(method) if isinstance(method, Method) else {}
    checked = read_config(
        {
            "seed": seed,
            "data": {"source": "python"},
            "method": {"name": name, **settings},
            "runtime": dict(runtime or {"name": "local"}),
            "federation": dict(federation or {}),
        }
    )
    resolved = {
        "seed": seed,
        "data": {"source": "python", "num_clients": len(data.clients), "validation_fraction": validation_fraction},
        "model": {
            "family": "own",
            "name": type(model).__name__
            if not callable(model) or hasattr(model, "forward")
            else getattr(model, "__name__", "own"),
        },
        "method": {"name": name, **to_json(_named(METHODS, name, settings, "method"))},
        "runtime": {**checked.runtime.model_dump()},
        "federation": checked.federation.model_dump(),
        "server": {**checked.server.model_dump(), "threads": _server_threads(checked)},
    }
    return Setting(data, spec), checked, resolved


def _run(
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
) -> Result:
    """Run a method on prepared data and write the run's folder.

    ``shared`` holds the journal of a comparison, so that methods that ask the same question share the answer.
    """
    seed = config.seed if seed is None else seed
    data, home = setting.data, shared or folder
    ledger, lines = Ledger(), []
    with ExitStack() as stack:
        journal = stack.enter_context(Journal(None if home is None else home / "journal"))
        if folder is not None:
            write_atomically(folder / "config.yaml", yaml.safe_dump(dict(resolved), sort_keys=False).encode())
        runtime_settings = _named(RUNTIMES, config.runtime.name, config.runtime.others, "runtime")
        states = StateStore(None if home is None else home / "clients")
        device = runtime_settings.client_device() if hasattr(runtime_settings, "client_device") else torch.device("cpu")
        sides = {
            client_id: ClientSide(
                client_id,
                client_data,
                setting.client_models.get(client_id, setting.model),
                device,
                getattr(runtime_settings, "client_threads", 1),
                states,
            )
            for client_id, client_data in data.clients.items()
        }
        runtime = runtime_settings.open(sides)
        stack.callback(runtime.close)
        job = Job(
            model=setting.model,
            client_models=setting.client_models,
            rng=Rng(derive_seed(seed, "server")),
            device=_server_device(config),
            progress=observer.server,
        )
        cohort = Cohort(
            runtime=runtime,
            method=method,
            model_of=job.model_of,
            seed=seed,
            journal=journal,
            ledger=ledger,
            terms=Terms(**config.federation.model_dump()),
            log=lambda facts: lines.append(dict(facts)),
            progress=observer.exchange,
        )
        stack.enter_context(fixed_threads(_server_threads(config)))
        reset_peak_rss()
        start = time.perf_counter()
        try:
            with job.rng.ambient("fuse"):
                fused = method.fuse(cohort, job)
        finally:
            _write_progress(folder, ledger, lines)
        server_seconds = time.perf_counter() - start - cohort.waited_s
        for key in journal.broken:
            observer.note(f"the journal's entry {key[:8]} was damaged and was asked for again")
        result = _judge(setting, fused, cohort, job, label, resolved, seed, folder, server_seconds)
    if folder is not None:
        _write_run(folder, result, ledger)
    observer.run_ended(result)
    return result


def _judge(
    setting: Setting,
    fused: Fused,
    cohort: Cohort,
    job: Job,
    label: str,
    resolved: Mapping[str, Any],
    seed: int,
    folder: Path | None,
    server_seconds: float,
) -> Result:
    """Score what came out on the test set, once, and put everything into one table."""
    data = setting.data
    module = None if fused.model is None else fused.model.module()
    seen = None if module is None or data.test is None else evaluate(module, data.test, device=job.device)
    counts = data.label_counts()
    clients: dict[str, dict[str, Any]] = {}
    for row, (client_id, part) in enumerate(data.clients.items()):
        accuracy, kind = None, ""
        if client_id in fused.personal and data.test is not None:
            accuracy, kind = (
                evaluate(fused.personal[client_id].module(), data.test, device=job.device).accuracy,
                "own model on test",
            )
        elif module is not None and len(part.validation):
            accuracy, kind = evaluate(module, part.validation, device=job.device).accuracy, "fused model on validation"
        clients[client_id] = {
            "num_examples": len(part.train),
            "num_validation": len(part.validation),
            "label_counts": counts[row].tolist(),
            "accuracy": accuracy,
            "accuracy_kind": kind,
        }
    accuracy = None if seen is None else seen.accuracy
    if module is None and data.test is not None and fused.personal:
        accuracy = statistics.fmean(clients[client_id]["accuracy"] for client_id in fused.personal)
    artifact, personal = _shipped(setting, fused, cohort, label)
    first = artifact or next(iter(personal.values()), None)
    sizes = [a.num_bytes for a in ([artifact] if artifact else personal.values())]
    totals = cohort.ledger.totals(sum(sizes))
    totals["server_seconds"] = server_seconds
    totals["peak_rss_bytes"] = max(cohort.ledger.peak_client_rss_bytes, peak_rss_bytes())
    facts = {
        "method": label,
        "accuracy": accuracy,
        "loss": None if seen is None else seen.loss,
        "seed": seed,
        "class_names": list(data.class_names),
        "confusion": None if seen is None else seen.confusion.tolist(),
        "clients": clients,
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
        "uploads": cohort.uploads,
        "versions": versions(),
        "config": dict(resolved),
    }
    return Result(label, accuracy, clients, totals, artifact, personal, dict(cohort.missing), facts, folder)


def _shipped(setting: Setting, fused: Fused, cohort: Cohort, label: str) -> tuple[Artifact | None, dict[str, Artifact]]:
    """The artifacts as they are shipped: they take inputs as the source gives them and say where they come from."""
    from fedfuse.models.normalized import normalized_artifact

    data = setting.data
    info = {
        "method": label,
        "class_names": list(data.class_names),
        "input_shape": list(data.input_shape),
        "uploads": cohort.uploads,
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
    import hashlib

    text = json.dumps({client_id: artifact.digest() for client_id, artifact in personal.items()}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


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
    import numpy

    found = {
        "fedfuse": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
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


def compare(
    config: ConfigLike,
    methods: Sequence[str | Mapping[str, Any] | Method] = (),
    *,
    seeds: int | Sequence[int] = 1,
    overrides: Sequence[str] = (),
    out: str | Path | None = None,
    observer: Observer | None = None,
) -> dict[str, Any]:
    """Run several methods on the same data and models, several seeds each; every client trains once per question.

    Args:
        config: a YAML file or a table. Settings under ``method.local`` hold for every method that trains locally.
        methods: names, ``name[key=value,...]``, tables like ``method`` with an optional ``label``, or method objects;
            the configuration's ``methods`` if left out.
        seeds: how many, counted from the configuration's seed, or which.
        overrides: ``section.key=value``.
        out: the comparison's folder. The same command continues there after a crash.
        observer: hears how far it is.

    Returns:
        The board, as in ``board.json``: ``{"rows": [{"method": ..., "accuracy_mean": ..., ...}], ...}``.

    Raises:
        ConfigError: there is nothing to compare, or a method is given twice.
    """
    observer = observer or Observer()
    checked = read_config(config, overrides)
    entries = [_method_entry(entry, checked) for entry in (methods or checked.methods)]
    if not entries:
        raise ConfigError(
            "there is nothing to compare",
            where="methods",
            fix="give --methods a,b,c or a list methods: in the configuration",
        )
    labels = [label for label, _ in entries]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice:
        raise ConfigError(f'the method "{twice}" is given twice', where="methods", fix="give each a label of its own")
    folder = None if out is None else Path(out)
    numbers = [checked.seed + k for k in range(seeds)] if isinstance(seeds, int) else list(seeds)
    if not numbers:
        raise ConfigError("there is no seed to run", where="seeds", fix="give at least 1")
    # Every method's settings are checked before the first client trains.
    configs = {label: checked.model_copy(update={"method": NamedSection(**section)}) for label, section in entries}
    resolved = {label: resolve(one) for label, one in configs.items()}
    loader = _Loader(checked)
    results: dict[str, list[Mapping[str, Any]]] = {label: [] for label in labels}
    board: dict[str, Any] = {}
    position = 0
    with ExitStack() as stack:
        home = folder
        if home is None:
            import tempfile

            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedfuse-")))
        for seed in numbers:
            setting: Setting | None = None
            for label in labels:
                position += 1
                observer.run_started(label, seed, position, len(numbers) * len(labels))
                run_folder = home / _slug(label) / f"seed_{seed}"
                table = {**resolved[label], "seed": seed}
                facts: Mapping[str, Any] | None = _finished(run_folder, table)
                if facts is None:
                    setting = setting or loader.setting(seed)
                    method = _named(METHODS, configs[label].method.name, configs[label].method.others, "method")
                    result = _run(
                        setting,
                        method,
                        configs[label],
                        table,
                        label=label,
                        folder=run_folder,
                        observer=observer,
                        shared=home,
                        seed=seed,
                    )
                    facts = result.facts
                results[label].append({**facts, "run": f"{_slug(label)}/seed_{seed}"})
                board = _board(results, resolved[labels[0]], numbers)
                if folder is not None:
                    write_atomically(folder / "board.json", json.dumps(board, indent=1).encode())
    return board


def _method_entry(entry: str | Mapping[str, Any] | Method, config: Config) -> tuple[str, dict[str, Any]]:
    """Label and section of one method of a comparison."""
    if isinstance(entry, Method):
        section: dict[str, Any] = {"name": entry.name, **to_json(entry)}
        label = entry.name
    elif isinstance(entry, str):
        name, _, rest = entry.partition("[")
        section, label = {"name": name.strip()}, entry.strip()
        for override in split_outside_brackets(rest.removesuffix("]")):
            section = _override(section, override)
    else:
        section = dict(entry)
        label = str(section.pop("label", section.get("name", "")))
    base = config.method
    known = getattr(METHODS.get(str(section.get("name"))), "__dataclass_fields__", {})
    # Settings of the same method are its base; equal local work is the ground on which all are compared.
    shared = (
        base.others
        if section["name"] == base.name
        else {k: v for k, v in base.others.items() if k == "local" and k in known}
    )
    return label, _merged({"name": section["name"], **shared}, section)


def _merged(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = _merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def split_outside_brackets(text: str) -> list[str]:
    """Split at commas that stand in no bracket.

    Args:
        text: for instance ``a,b[x=1,y=2],c``.

    Returns:
        The parts without spaces around them; empty ones are left out.

    Example:
        >>> split_outside_brackets("a, b[x=1,y=2]")
        ['a', 'b[x=1,y=2]']
    """
    parts, depth, current = [], 0, ""
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth == 0:
            parts.append(current)
            current = ""
        else:
            current += letter
    return [part.strip() for part in [*parts, current] if part.strip()]


def _slug(label: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.=-]+", "_", label).strip("_") or "method"


def _finished(folder: Path, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of a run that is already complete under the same configuration and version."""
    try:
        facts = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    same = json.dumps(facts.get("config"), sort_keys=True) == json.dumps(config, sort_keys=True)
    return facts if same and facts.get("versions", {}).get("fedfuse") == VERSION else None


def _board(
    results: Mapping[str, Sequence[Mapping[str, Any]]], config: Mapping[str, Any], seeds: Sequence[int]
) -> dict[str, Any]:
    rows = []
    for label, runs in results.items():
        if not runs:
            continue
        scores = [run["accuracy"] for run in runs if run["accuracy"] is not None]
        names = [
            "upload_bytes",
            "download_bytes",
            "exchanges",
            "storage_bytes",
            "artifact_bytes",
            "client_seconds",
            "server_seconds",
            "peak_rss_bytes",
        ]
        rows.append(
            {
                "method": label,
                "accuracy_mean": statistics.fmean(scores) if scores else None,
                "accuracy_std": (statistics.stdev(scores) if len(scores) > 1 else 0.0) if scores else None,
                "accuracies": scores,
                "num_seeds": len(runs),
                **{name: statistics.fmean(run["ledger"][name] for run in runs) for name in names},
                "runs": [run["run"] for run in runs],
            }
        )
    return {"rows": rows, "seeds": list(seeds), "config": dict(config), "versions": versions()}


def folder_name(config: Config) -> str:
    """A name for a run's folder that is the same for the same configuration, so that the same command continues.

    Args:
        config: the configuration.

    Returns:
        Method, source, seed and a few digits of a digest.
    """
    import hashlib

    digest = hashlib.sha256(json.dumps(resolve(config), sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.method.name}-{config.data.source}-s{config.seed}-{digest}"
