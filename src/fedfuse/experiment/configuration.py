"""From YAML to a checked configuration, and from its sections to the objects that they name."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from fedfuse.core.errors import ConfigError, did_you_mean
from fedfuse.core.registry import ATTACKS, METHODS, MODELS, PARTITIONS, RUNTIMES, SOURCES, Registry
from fedfuse.core.settings import config_error, from_json, to_json
from fedfuse.data.augment import check_augment
from fedfuse.data.normalize import KNOWN
from fedfuse.data.server import HeldOut
from fedfuse.experiment.compressing import resolved_upload
from fedfuse.experiment.private import resolved_privacy
from fedfuse.experiment.sections import AttackSection
from fedfuse.experiment.sections import Config as Config
from fedfuse.experiment.sections import DataSection as DataSection
from fedfuse.experiment.sections import ModelSection as ModelSection
from fedfuse.experiment.sections import NamedSection as NamedSection
from fedfuse.experiment.sections import ServerDataSection as ServerDataSection

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
            **data.model_dump(include=set(DataSection.model_fields) - {"source", "partition", "server"}),
            "server": None if data.server is None else _resolved_server(data.server),
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
        **({} if config.attack is None else {"attack": _resolved_attack(config.attack)}),
        **resolved_privacy(config),
        **resolved_upload(config),
    }


def attack_of(section: AttackSection) -> Any:
    """The attack that a section names.

    Args:
        section: the section.

    Raises:
        ConfigError: a setting of the attack is unknown or wrong.
    """
    return named(ATTACKS, section.name, section.others, "attack", "name", "clients")


def _resolved_attack(section: AttackSection) -> dict[str, Any]:
    return {"name": section.name, "clients": section.clients, **to_json(attack_of(section))}


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


def server_part_of(server: ServerDataSection) -> HeldOut | Any:
    """What the server's data is made from.

    Args:
        server: the section.

    Returns:
        The part to hold out, or the settings of a source.

    Raises:
        ConfigError: it names both or neither, or a setting is wrong.
    """
    if server.source is not None:
        if server.fraction is not None or server.num_examples is not None:
            raise ConfigError(
                "the server's data has a source and the size of a part",
                where="data.server",
                fix="give a source, or a part of the training data to hold out, not both",
            )
        if server.source == "own":
            raise ConfigError(
                "this run had server data of a program's own",
                where="data.server.source",
                fix="repeat it from that program: fedfuse.run(..., server_data=...)",
            )
        return named(SOURCES, server.source, server.others, "data.server", *ServerDataSection.model_fields)
    for key in server.others:
        fix = did_you_mean(key, ServerDataSection.model_fields)
        raise ConfigError(f'unknown setting "{key}"', where=f"data.server.{key}", fix=fix)
    return HeldOut(fraction=server.fraction, num_examples=server.num_examples)


def _resolved_server(server: ServerDataSection) -> dict[str, Any]:
    if server.source == "own":
        return {"source": "own", "labelled": server.labelled}
    part = server_part_of(server)
    if isinstance(part, HeldOut):
        return {"fraction": part.fraction, "num_examples": part.num_examples, "labelled": server.labelled}
    return {"source": server.source, **to_json(part), "limit": server.limit, "labelled": server.labelled}


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
    settings = _laid_over(model.others if name == model.family else {}, own)
    where = f"model.clients.{client_id}" if client_id else "model"
    return name, named(MODELS, name, settings, where, "family", "clients")


def _laid_over(table: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """One table over another; tables within them likewise."""
    found = dict(table)
    for key, value in own.items():
        below = found.get(key)
        is_nested = isinstance(value, Mapping) and isinstance(below, Mapping)
        found[key] = _laid_over(below, value) if is_nested else value  # type: ignore[arg-type]
    return found


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
