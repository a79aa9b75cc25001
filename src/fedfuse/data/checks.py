"""Checks of settings that sources and partitions share; each message names the setting."""

from __future__ import annotations

import importlib
import math
from typing import Any

from fedfuse.core.errors import ConfigError, DataError


def check_at_least(setting: str, value: float, minimum: float) -> None:
    """Refuse a number that is too small.

    Args:
        setting: full name, such as ``partition.num_clients``.
        value: what was given.
        minimum: the least that it can be.

    Raises:
        ConfigError: it is smaller, or no number.
    """
    if not value >= minimum:
        name = setting.rpartition(".")[2]
        raise ConfigError(
            f"{name} must be at least {minimum}, not {value}", where=setting, fix=f"set {name} to {minimum} or more"
        )


def check_positive(setting: str, value: float) -> None:
    """Refuse a number that is not above 0.

    Args:
        setting: full name, such as ``partition.dirichlet_alpha``.
        value: what was given.

    Raises:
        ConfigError: it is 0, negative, infinite or no number.
    """
    if not (value > 0 and math.isfinite(value)):
        name = setting.rpartition(".")[2]
        raise ConfigError(f"{name} must be above 0, not {value}", where=setting, fix=f"set {name} to a positive number")


def check_fraction(setting: str, value: float) -> None:
    """Refuse a fraction outside [0, 1).

    Args:
        setting: full name, such as ``source.test_fraction``.
        value: what was given.

    Raises:
        ConfigError: it is negative, 1 or more, or no number.
    """
    if not 0 <= value < 1:
        name = setting.rpartition(".")[2]
        raise ConfigError(f"{name} must be in [0, 1), not {value}", where=setting, fix="0.1 means one tenth")


def check_limit(setting: str, value: int | None) -> None:
    """Refuse a limit of rows below 1.

    Args:
        setting: ``limit`` or ``test_limit``.
        value: what was given; ``None`` means all rows.

    Raises:
        ConfigError: it is below 1.
    """
    if value is not None:
        check_at_least(setting, value, 1)


def optional_module(module: str, *, package: str, extra: str) -> Any:
    """Import a module that not every installation has.

    Args:
        module: dotted name.
        package: what the package index calls it.
        extra: the extra of fedfuse that brings it.

    Returns:
        The module.

    Raises:
        DataError: it is not installed, or its import fails.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] == module.split(".")[0]
        what = f"{package} is not installed" if missing else f"{package} cannot be imported: {error}"
        raise DataError(what, fix=f'pip install "fedfuse[{extra}]"') from None
