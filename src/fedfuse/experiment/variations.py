"""Settings that are varied in a comparison: how they are written, and the folders that their values have."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fedfuse.core.errors import ConfigError
from fedfuse.experiment.configuration import override

_LONGEST_NAME = 100


def read_variations(vary: Mapping[str, Sequence[Any]] | Sequence[str]) -> dict[str, list[Any]]:
    """Settings that are varied, and their values.

    Args:
        vary: a table, or texts ``section.key=value,value`` with YAML values.

    Returns:
        Setting to its values, in the order given.

    Raises:
        ConfigError: a text is no such setting, or a value is missing, repeated or a seed.

    Example:
        >>> read_variations(["data.partition.num_clients=5,10"])
        {'data.partition.num_clients': [5, 10]}
    """
    if isinstance(vary, str):
        vary = [vary]
    found: dict[str, list[Any]] = {}
    given = vary.items() if isinstance(vary, Mapping) else [_variation(text) for text in vary]
    for key, values in given:
        if key == "seed":
            raise ConfigError("the seed is varied", where="vary", fix="say how many seeds with --seeds")
        if key in found:
            raise ConfigError(f'"{key}" is varied twice', where="vary", fix="give all its values at once")
        if isinstance(values, str) or not isinstance(values, Sequence) or not values:
            raise ConfigError(f'"{key}" has no values', where="vary", fix=f"write {key}=value,value")
        texts = [json.dumps(value, sort_keys=True) for value in values]
        twice = next((text for text in texts if texts.count(text) > 1), None)
        if twice is not None:
            raise ConfigError(f'"{key}" has the value {twice} twice', where="vary", fix="give each value once")
        found[str(key)] = list(values)
    return found


def _variation(text: str) -> tuple[str, list[Any]]:
    path, equals, written = text.partition("=")
    values = []
    for part in split_outside_brackets(written):
        # Each value is read like that of --set.
        table: Any = override({}, f"value{equals}{part}", where="vary")
        values.append(table["value"])
    if not equals or not path.strip():
        raise ConfigError(f'"{text}" varies nothing', where="vary", fix="write section.key=value,value")
    return path.strip(), values


def combinations(varied: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
    """Every choice of one value per setting; one empty choice where nothing is varied.

    Args:
        varied: setting to its values; the last one changes fastest.

    Example:
        >>> combinations({"a": [1, 2], "b": [3]})
        [{'a': 1, 'b': 3}, {'a': 2, 'b': 3}]
    """
    return [dict(zip(varied, values, strict=True)) for values in itertools.product(*varied.values())]


def setting_folders(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """A folder's name for each setting: the last words of its keys, or the whole keys where those are not enough.

    Args:
        settings: the choices of :func:`combinations`.

    Returns:
        Different names.

    Example:
        >>> setting_folders([{"data.limit": 10}, {"data.limit": 20}])
        ['limit=10', 'limit=20']
    """
    for short in (True, False):
        slugs = [
            folder_of(
                "_".join(f"{key.rpartition('.')[2] if short else key}={_word(value)}" for key, value in setting.items())
            )
            for setting in settings
        ]
        last = [key.rpartition(".")[2] for key in settings[0]]
        if len(set(slugs)) == len(slugs) and (not short or len(set(last)) == len(last)):
            return slugs
    # Values that differ in what no name of a folder can hold.
    return [f"{index}_{slug}" for index, slug in enumerate(slugs)]


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


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


def folder_of(label: str) -> str:
    """A name for the folder of a method or a setting.

    Args:
        label: any text.

    Returns:
        The text with all but letters, digits and a few signs replaced; never the name of a folder of the
        comparison's own.

    Example:
        >>> folder_of("fusefl[num_blocks=2]"), folder_of("journal")
        ('fusefl_num_blocks=2', 'journal_method')
        >>> len(folder_of("x" * 300)), folder_of("x" * 300) == folder_of("x" * 301)
        (100, False)
    """
    slug = re.sub(r"[^A-Za-z0-9_.=-]+", "_", label).strip("_.") or "method"
    if len(slug) > _LONGEST_NAME:
        # File systems refuse long names; the digest keeps two long labels apart.
        slug = f"{slug[: _LONGEST_NAME - 9]}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
    # The comparison's own folders stand beside those of the methods.
    return f"{slug}_method" if slug in ("journal", "clients", "figures") else slug
