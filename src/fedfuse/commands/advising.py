"""``fedfuse advise``: which method to choose, from comparisons that were run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedfuse.core.errors import ConfigError
from fedfuse.report.advice import SOURCE, Constraints, advise
from fedfuse.report.reading import parse_board, read_table

RUNS = Path("runs")


def advise_on(
    path: Path,
    *,
    max_upload_bytes: float | None = None,
    is_heterogeneous: bool = False,
    server_data: str | None = None,
    budget_s: float | None = None,
) -> list[str]:
    """Say which method to choose.

    Args:
        path: a comparison's folder, its ``board.json``, or the configuration that was compared.
        max_upload_bytes: most that one client may upload.
        is_heterogeneous: whether clients own models of different architectures.
        server_data: ``yes`` or ``no``; ``None`` where the server could get some.
        budget_s: most seconds of computing, of all clients and the server together.

    Returns:
        Lines of text: the constraints, the advice for each setting of each comparison, and where it comes from.

    Raises:
        ConfigError: there is no comparison, or a constraint cannot be read.
    """
    if server_data not in (None, "yes", "no"):
        raise ConfigError(f'"{server_data}" is neither yes nor no', where="--server-data", fix="say yes or no")
    has_server_data = None if server_data is None else server_data == "yes"
    constraints = Constraints(max_upload_bytes, is_heterogeneous, has_server_data, budget_s)
    lines = [f"constraints: {constraints.in_words()}"]
    for file in boards_of(path):
        lines.append(f"from {file.parent}:")
        lines += advise(parse_board(read_table(file)), constraints)
    return [*lines, SOURCE]


def boards_of(path: Path) -> list[Path]:
    """The files ``board.json`` that a path stands for.

    Args:
        path: a comparison's folder, its ``board.json``, or a configuration, whose comparisons are looked for under
            ``runs/``.

    Returns:
        One file, or for a configuration each that there is.

    Raises:
        ConfigError: there is none.
    """
    if path.is_dir():
        if not (path / "board.json").is_file():
            raise ConfigError(
                "there is no comparison here: board.json is missing",
                where=str(path),
                fix="name the folder of a `fedfuse compare`, or a configuration",
            )
        return [path / "board.json"]
    if path.suffix == ".json":
        return [path]
    from fedfuse.experiment import comparison_name, read_config, resolve

    config = read_config(path)
    name, wanted = comparison_name(config, {}), resolve(config)
    found = [
        file
        for file in sorted(RUNS.glob("*/board.json"))
        if file.parent.name == name or file.parent.name.startswith(f"{name}-by-") or _is_of(file, wanted)
    ]
    if not found:
        raise ConfigError(
            "this configuration was not compared yet",
            where=str(RUNS / name),
            fix=f"run: fedfuse compare {path}" + ("" if config.methods else " --methods local,fedavg,ensemble,fusefl"),
        )
    return found


def _is_of(file: Path, wanted: Mapping[str, Any]) -> bool:
    """Whether a comparison under another name had the same data and model."""
    try:
        config = read_table(file).get("config")
    except ConfigError:
        return False
    return isinstance(config, Mapping) and all(config.get(part) == wanted[part] for part in ("data", "model"))
