"""``fedfuse fuse A B C``: adapters, checkpoints and artifacts that people already have."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from fedfuse.core.errors import ConfigError
from fedfuse.core.places import local_folder
from fedfuse.fusing import FusedAdapters, RuleRow, compare_rules, fuse, fuse_adapters
from fedfuse.fusing.adapter import Adapter
from fedfuse.fusing.files import is_adapter
from fedfuse.fusing.measuring import ModuleError
from fedfuse.report.units import format_bytes, format_count, natural_key

_MOST_ROWS = 30


def fuse_and_tell(
    paths: Sequence[str],
    *,
    method: str,
    weights: str,
    rank: int | None,
    base: str | None,
    settings: Sequence[str],
    out: Path | None,
    compares: bool,
    console: Console | None = None,
) -> None:
    """Fuse files and say how exact the result is.

    Args:
        paths: what to fuse.
        method: the rule, ``name[key=value,...]``; by the files' kind if empty.
        weights: numbers with commas between; equal if empty.
        rank: of a fused adapter.
        base: the base model or where training began.
        settings: of the rule, ``key=value``.
        out: folder of the result; may be left out where rules are only compared.
        compares: whether to show what all rules would make of the adapters.
        console: where to print; the terminal if left out.

    Raises:
        ConfigError: words that do not fit together.
    """
    console = console or Console(soft_wrap=True, highlight=False)
    if out is None and not compares:
        raise ConfigError("there is no folder for the result", where="--out", fix="give --out FOLDER")
    _refuse_contributions(paths)
    name, values = rule_of(method, settings)
    shares = numbers_of(weights)
    if compares:
        print_comparison(_compared(paths, shares, rank, str(values.get("base_model", "")), console), console)
    if out is None:
        return
    if not is_adapter(local_folder(paths[0])):
        folder = fuse(paths, method=name, weights=shares, rank=rank, base=base, out=out, **values)
        console.print(f"wrote {folder}")
        return
    _refuse_mixture(paths)
    done = fuse_adapters(paths, method=name or "flora", weights=shares, rank=rank, base=base, out=out, **values)
    print_fused(done, console)


def print_fused(done: FusedAdapters, console: Console) -> None:
    """Say what came out, and how far it is from the exact sum, weight by weight.

    Args:
        done: the result.
        console: where.
    """
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("weight")
    for heading in ("rank", "relative error"):
        table.add_column(heading, justify="right")
    worst = sorted(done.errors, key=lambda module: (-done.errors[module].relative, natural_key(module)))[:_MOST_ROWS]
    for module in sorted(worst, key=natural_key):
        table.add_row(module, f"{done.ranks.get(module, '')}", format_error(done.errors[module]))
    if len(done.errors) > _MOST_ROWS:
        table.add_row(f"({len(done.errors) - _MOST_ROWS} more, none with a larger error: fusion.json)", "", "")
    table.add_row("all together", "", format_error(done.error), style="bold")
    console.print(f"{done.method} against the exact weighted sum:")
    console.print(table)
    for note in done.notes:
        console.print(f"note: {note}", markup=False)
    size = f": {format_bytes(done.num_bytes)}" if done.num_bytes else ""
    console.print(f"wrote {done.folder}{size}", markup=False)


def print_comparison(rows: Sequence[RuleRow], console: Console) -> None:
    """What all rules would make of the same adapters.

    Args:
        rows: the nearest first.
        console: where.
    """
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("rule")
    for heading in ("largest rank", "parameters", "relative error"):
        table.add_column(heading, justify="right")
    for row in rows:
        if row.error is None:
            table.add_row(row.method, "", "", row.reason, style="dim")
        else:
            table.add_row(row.method, f"{row.largest_rank}", format_count(row.num_parameters), format_error(row.error))
    console.print("every rule against the exact weighted sum, before rounding:")
    console.print(table)


def format_error(error: ModuleError) -> str:
    """A relative error as people read it.

    Args:
        error: distance and size.

    Returns:
        Percent, or a power of ten where it is tiny.

    Example:
        >>> [format_error(ModuleError(d, 1.0)) for d in (0.0, 3e-8, 0.1234)]
        ['0', '3.0e-08', '12.34 %']
    """
    value = error.relative
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.2%}".replace("%", " %") if value >= 1e-4 else f"{value:.1e}"


def describe_adapter(folder: Path) -> str:
    """What an adapter is: base model, ranks, scales, targets, sizes.

    Args:
        folder: as PEFT saved it.

    Returns:
        Some lines of text.
    """
    adapter = Adapter(folder)
    table = adapter.config.table
    ranks = sorted({place.rank for place in adapter.modules.values()})
    alphas = sorted({adapter.config.alpha_of(module) for module in adapter.modules})
    scales = sorted({adapter.config.scale_of(module) for module in adapter.modules})
    lasts = sorted({module.rpartition(".")[2] for module in adapter.modules})
    kind = ("DoRA" if adapter.config.is_dora else "LoRA") + (", rsLoRA" if adapter.config.is_rank_stabilised else "")
    revision = f" at {table['revision']}" if table.get("revision") else ""
    lines = [
        f"adapter {folder}: {kind}",
        f"  base model  {adapter.config.base_model or 'not said'}{revision}",
        f"  rank        {_span(ranks)}",
        f"  alpha       {_span(alphas)}, so that B A counts {_span(scales)} times",
        f"  targets     {', '.join(lasts)} ({len(adapter.modules)} weights)",
    ]
    if adapter.wholes:
        lines.append(f"  saved whole {', '.join(adapter.wholes)}")
    dtype = str(adapter.dtype).removeprefix("torch.")
    lines.append(f"  parameters  {adapter.num_parameters:,} numbers of {dtype}, {adapter.num_bytes:,} bytes")
    lines.append(f"  digest      {adapter.digest}")
    if (folder / "fusion.json").is_file():
        facts = json.loads((folder / "fusion.json").read_text(encoding="utf-8"))
        lines.append(f"  fused by    {facts['method']} of {len(facts['adapters'])} adapters")
        lines += [
            f"  from        {a['name']} ({a['weight']:.4g}) {a['digest'][:8]}".rstrip() for a in facts["adapters"]
        ]
    return "\n".join(lines)


def _compared(
    paths: Sequence[str], weights: Sequence[float] | None, rank: int | None, base_model: str, console: Console
) -> list[RuleRow]:
    _refuse_mixture(paths)
    with console.status("") as status:
        return compare_rules(paths, weights=weights, rank=rank, base_model=base_model, progress=status.update)


def _refuse_contributions(paths: Sequence[str]) -> None:
    for path in map(Path, paths):
        if path.suffix == ".fed" or (path.is_dir() and any(path.glob("*.fed"))):
            raise ConfigError(
                "contributions are fused with the federation's configuration", where=str(path), fix="give --config"
            )


def _refuse_mixture(paths: Sequence[str]) -> None:
    other = next((path for path in paths if not is_adapter(local_folder(path))), None)
    if other is not None:
        raise ConfigError("this is no adapter", where=other, fix="name folders of adapters only, or whole models only")


def rule_of(method: str, settings: Sequence[str]) -> tuple[str, dict[str, Any]]:
    """A rule's name and settings.

    Args:
        method: ``name[key=value,...]``; may be empty.
        settings: ``key=value``.

    Returns:
        The name, and key to value.

    Raises:
        ConfigError: a word is no setting.
    """
    name, _, inner = method.partition("[")
    words = [word for word in inner.removesuffix("]").split(",") if word.strip()]
    values = {}
    for word in [*words, *settings]:
        key, sign, value = word.partition("=")
        if not sign or not key.strip():
            raise ConfigError(f'"{word}" is no setting', where="--set", fix="write KEY=VALUE")
        try:
            values[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ConfigError(f'"{word}" has no readable value', where="--set", fix="write KEY=VALUE") from None
    clash = {"paths", "method", "weights", "rank", "base", "out"} & set(values)
    if clash:
        raise ConfigError(f'"{min(clash)}" is no setting of a rule', where="--set", fix=f"use --{min(clash)}")
    return name.strip(), values


def numbers_of(weights: str) -> list[float] | None:
    """Numbers that were given with commas between.

    Args:
        weights: may be empty.

    Returns:
        The numbers; nothing if there are none.

    Raises:
        ConfigError: a word is no number.
    """
    if not weights.strip():
        return None
    try:
        return [float(word) for word in weights.split(",")]
    except ValueError:
        raise ConfigError(
            f'"{weights}" are no weights', where="--weights", fix="write numbers with commas between, e.g. 0.5,0.3,0.2"
        ) from None


def _span(values: Sequence[float]) -> str:
    return f"{values[0]:g}" if len(values) == 1 else f"{values[0]:g} to {values[-1]:g}"
