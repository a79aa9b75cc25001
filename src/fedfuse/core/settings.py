"""Frozen dataclasses of settings to JSON and back, with errors that name the setting."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, TypeVar

import pydantic

from fedfuse.core.errors import ConfigError, did_you_mean

T = TypeVar("T")


def to_json(settings: Any) -> dict[str, Any]:
    """Turn a dataclass of settings into plain tables, lists and scalars.

    Args:
        settings: a dataclass instance; nested dataclasses become nested tables.

    Returns:
        What :func:`from_json` turns back.
    """
    return {f.name: _plain(getattr(settings, f.name)) for f in dataclasses.fields(settings) if f.init}


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return to_json(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def from_json(kind: type[T], values: Mapping[str, Any], *, where: str) -> T:
    """Build a dataclass of settings from a table, checked.

    Args:
        kind: the dataclass.
        values: setting to value, as YAML or JSON gives them.
        where: what the table is called in messages, such as ``method``.

    Returns:
        The settings.

    Raises:
        ConfigError: a setting is unknown, missing, or has a value that it cannot have.
    """
    try:
        return typing.cast(T, _adapter(typing.cast(Hashable, kind)).validate_python(_over_defaults(kind, values)))
    except pydantic.ValidationError as error:
        raise config_error(error, kind, where) from None


def _over_defaults(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """Inner tables laid over the outer class's own default of that setting, which may differ from the inner class's."""
    found = dict(values)
    for f in dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ():
        given = found.get(f.name)
        if not isinstance(given, Mapping):
            continue
        own = f.default if f.default_factory is dataclasses.MISSING else f.default_factory()
        if dataclasses.is_dataclass(own) and not isinstance(own, type):
            found[f.name] = {**to_json(own), **_over_defaults(type(own), given)}
    return found


@cache
def _adapter(kind: Hashable) -> pydantic.TypeAdapter[Any]:
    assert isinstance(kind, type)
    _forbid_unknown(kind)
    return pydantic.TypeAdapter(kind)


def _forbid_unknown(kind: type) -> None:
    """Pydantic takes unknown names in silence unless each dataclass says otherwise."""
    if "__pydantic_config__" not in vars(kind):
        kind.__pydantic_config__ = pydantic.ConfigDict(extra="forbid")  # type: ignore[attr-defined]
    hints = typing.get_type_hints(kind)
    for f in dataclasses.fields(kind):
        for part in (hints[f.name], *typing.get_args(hints[f.name])):
            if isinstance(part, type) and dataclasses.is_dataclass(part) and "__pydantic_config__" not in vars(part):
                _forbid_unknown(part)


def config_error(error: pydantic.ValidationError, kind: type, where: str) -> ConfigError:
    """Say the first thing that pydantic found wrong in our words.

    Args:
        error: what pydantic raised.
        kind: the class that was to be built.
        where: what the table is called.

    Returns:
        The error to raise.
    """
    first = error.errors()[0]
    path = _setting_path(kind, first["loc"])
    setting = ".".join([where, *path]) if path else where
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        known = _names_at(kind, path[:-1])
        return ConfigError(f'unknown setting "{path[-1]}"', where=setting, fix=did_you_mean(path[-1], known))
    if first["type"] in ("missing", "missing_argument", "missing_keyword_only_argument"):
        return ConfigError(f'the setting "{path[-1]}" is missing', where=setting, fix=f"give {setting} a value")
    if first["type"] in ("model_type", "dataclass_type", "dict_type"):
        return ConfigError(
            f"this is no table of settings: {first['input']!r:.60}", where=setting, fix="write it as {key: value, ...}"
        )
    message = first["msg"].removeprefix("Value error, ")
    return ConfigError(
        f"{message[:1].lower()}{message[1:]}, not {first['input']!r:.60}",
        where=setting,
        fix="see docs or fedfuse run --dry-run for what it can be",
    )


def _setting_path(kind: type, loc: Sequence[int | str]) -> list[str]:
    """The names of settings in pydantic's path, which also names the branches of unions that it tried."""
    path: list[str] = []
    for part in loc:
        if (
            isinstance(part, int)
            or part in _names_at(kind, path)
            or (part == loc[-1] and str(part).isidentifier() and part not in ("int", "str", "float", "bool"))
        ):
            path.append(str(part))
    return path


def _names_at(kind: type, path: Iterable[str]) -> list[str]:
    for part in path:
        hints = typing.get_type_hints(kind)
        inner = [hints.get(part), *typing.get_args(hints.get(part))]
        kind = next(
            (k for k in inner if isinstance(k, type) and (dataclasses.is_dataclass(k) or hasattr(k, "model_fields"))),
            kind,
        )
    if dataclasses.is_dataclass(kind):
        return [f.name for f in dataclasses.fields(kind) if f.init]
    return list(getattr(kind, "model_fields", {}))
