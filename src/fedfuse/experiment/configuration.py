"""From YAML to a checked configuration, and from its sections to the objects that they name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from fedfuse.core.errors import ConfigError, did_you_mean
from fedfuse.core.registry import METHODS, MODELS, PARTITIONS, RUNTIMES, SOURCES, Registry
from fedfuse.core.settings import config_error, from_json, to_json
from fedfuse.data.augment import check_augment
from fedfuse.data.normalize import KNOWN


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
    server: ServerSection = pydantic.Field(default_factory=ServerSection)
    methods: list[str | dict[str, Any]] = pydantic.Field(default_factory=list)


ConfigLike = str | Path | Mapping[str, Any] | Config


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
    elif isinstance(config, (str, Path)):
        table = _read_yaml(Path(config))
    else:
        table = config
    if not isinstance(table, dict):
        raise ConfigError(
            "the configuration is no table", where=str(config)[:80], fix="begin with: data: {source: digits}"
        )
    for text in overrides:
        table = override(table, text)
    try:
        return Config.model_validate(table)
    except pydantic.ValidationError as error:
        mended = config_error(error, Config, "config")
        mended.where = mended.where.removeprefix("config.")
        mended.fix = mended.fix.replace("config.", "")
        raise mended from None


def _read_yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"cannot read the configuration: {error.strerror}", where=str(path), fix="name a YAML file"
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"the configuration is not YAML: {' '.join(str(error).split())}",
            where=str(path),
            fix="mend the place that is named",
        ) from None


def override(table: Mapping[str, Any], text: str, *, where: str = "--set") -> dict[str, Any]:
    """Put one setting into a table.

    Args:
        table: left as it is.
        text: ``section.key=value`` with a YAML value.
        where: what the text is called in messages.

    Returns:
        A new table.

    Raises:
        ConfigError: the text is no setting.
    """
    path, equals, written = text.partition("=")
    if not equals or not path.strip():
        raise ConfigError(f'"{text}" is no setting', where=where, fix="write key=value, or section.key=value")
    try:
        value = yaml.safe_load(written)
    except yaml.YAMLError:
        raise ConfigError(f'"{written}" is no YAML value', where=f"{where} {path}", fix="quote it") from None
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
    data, runtime = config.data, config.runtime
    scheme, partition = partition_of(data)
    if data.augment != "auto":
        check_augment(data.augment)
    if isinstance(data.normalize, str) and data.normalize not in {"auto", "none", *KNOWN}:
        raise ConfigError(
            f'there is no normalisation "{data.normalize}"',
            where="data.normalize",
            fix=did_you_mean(data.normalize, {"auto", "none", *KNOWN}),
        )
    for client_id in config.model.clients:
        family_of(config.model, client_id)
    method = named(METHODS, config.method.name, config.method.others, "method", "name")
    return {
        "seed": config.seed,
        "data": {
            "source": data.source,
            **to_json(source_of(data)),
            **data.model_dump(include=set(DataSection.model_fields) - {"source", "partition"}),
            "partition": {"scheme": scheme, **to_json(partition)},
        },
        "model": {
            "family": config.model.family,
            **to_json(family_of(config.model)[1]),
            "clients": config.model.clients,
        },
        "method": {"name": config.method.name, **to_json(method)},
        "runtime": {"name": runtime.name, **to_json(named(RUNTIMES, runtime.name, runtime.others, "runtime", "name"))},
        "federation": config.federation.model_dump(),
        "server": {**config.server.model_dump(), "threads": server_threads(config)},
    }


def named(registry: Registry[Any], name: str, settings: Mapping[str, Any], where: str, *also: str) -> Any:
    """The settings object of something in a registry.

    Args:
        registry: where the name is looked up.
        name: registry key.
        settings: setting to value.
        where: the section's name, for messages.
        also: other keys that the section may have, for suggestions.

    Raises:
        ConfigError: a setting is unknown, missing or wrong.
    """
    kind = registry.get(name)
    known = {f.name for f in dataclasses.fields(kind)}
    for key in settings:
        if key not in known:
            fix = did_you_mean(str(key), {*known, *also})
            raise ConfigError(f'unknown setting "{key}"', where=f"{where}.{key}", fix=fix)
    return from_json(kind, settings, where=where)


def source_of(data: DataSection) -> Any:
    """The source that a section names.

    Args:
        data: the section.

    Raises:
        ConfigError: it names none, or its settings are wrong.
    """
    if data.source == "own":
        raise ConfigError(
            "this run had a model and data of a program's own",
            where="data.source",
            fix="repeat it from that program: fedfuse.run(model=..., clients=...)",
        )
    return named(SOURCES, data.source, data.others, "data", *DataSection.model_fields)


def partition_of(data: DataSection) -> tuple[str, Any]:
    """Name and settings of the partition that a section names.

    Args:
        data: the section.

    Raises:
        ConfigError: it names none.
    """
    settings = dict(data.partition)
    scheme = settings.pop("scheme", None)
    if not isinstance(scheme, str):
        known = ", ".join(PARTITIONS.names())
        raise ConfigError('the setting "scheme" is missing', where="data.partition.scheme", fix=f"known: {known}")
    return scheme, named(PARTITIONS, scheme, settings, "data.partition", "scheme")


def family_of(model: ModelSection, client_id: str = "") -> tuple[str, Any]:
    """Name and settings of the model that a section names.

    Args:
        model: the section.
        client_id: for a client with a model of its own; what it does not say, it has in common with the others.
    """
    own = dict(model.clients.get(client_id, {}))
    name = str(own.pop("family", model.family))
    settings = {**(model.others if name == model.family else {}), **own}
    where = f"model.clients.{client_id}" if client_id else "model"
    return name, named(MODELS, name, settings, where, "family", "clients")


def server_threads(config: Config) -> int:
    """Torch threads that the server computes with.

    Args:
        config: the configuration.
    """
    return config.server.threads or os.cpu_count() or 1


def folder_name(config: Config) -> str:
    """A name for a run's folder that is the same for the same configuration, so that the same command continues.

    Args:
        config: the configuration.

    Returns:
        Method, source, seed and a few digits of a digest.
    """
    digest = hashlib.sha256(json.dumps(resolve(config), sort_keys=True).encode()).hexdigest()[:8]
    return f"{config.method.name}-{config.data.source}-s{config.seed}-{digest}"
