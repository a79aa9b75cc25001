"""``fedfuse fuse NEW --into FOLDER``: adapters that come one by one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from fedfuse.commands.fusing_files import numbers_of, print_fused, rule_of
from fedfuse.core.errors import ConfigError
from fedfuse.fusing import add_adapter, arrivals_of, drop_adapter


def grow_and_tell(
    paths: Sequence[str],
    into: Path,
    *,
    name: str = "",
    drop: Sequence[str] = (),
    method: str = "",
    weights: str = "",
    rank: int | None = None,
    settings: Sequence[str] = (),
    console: Console | None = None,
) -> None:
    """Let adapters join a growing folder, or leave it, and say what it now holds.

    Args:
        paths: of the adapters that join, one after the other.
        into: the growing folder.
        name: what the folder is to call the one that joins.
        drop: names of adapters that leave.
        method: the rule, ``name[key=value,...]``; decided by the first arrival.
        weights: numbers with commas between, one per path; 1 if empty.
        rank: of the result, for rules that choose one.
        settings: of the rule, ``key=value``.
        console: where to print; the terminal if left out.

    Raises:
        ConfigError: words that do not fit together.
    """
    console = console or Console(soft_wrap=True, highlight=False)
    if not paths and not drop:
        raise ConfigError("no adapter joins or leaves", where="--into", fix="name an adapter, or give --drop NAME")
    if name and len(paths) != 1:
        raise ConfigError(f"there are {len(paths)} adapters for one name", where="--name", fix="let them join in turn")
    shares = numbers_of(weights) or [1.0] * len(paths)
    if len(shares) != len(paths):
        raise ConfigError(
            f"there are {len(shares)} weights for {len(paths)} adapters", where="--weights", fix="give one per adapter"
        )
    rule, values = rule_of(method, settings)
    for leaving in drop:
        done = drop_adapter(into, leaving)
    for path, weight in zip(paths, shares, strict=True):
        done = add_adapter(into, path, name=name, weight=weight, method=rule, rank=rank, **values)
    print_fused(done, console)
    arrived = arrivals_of(into)
    whole = sum(arrival.weight for arrival in arrived)
    shown = ", ".join(f"{arrival.name} {arrival.weight / whole:.3g}" for arrival in arrived)
    count = f"{len(arrived)} adapter" + ("s" if len(arrived) > 1 else "")
    console.print(f"{count} so far: {shown}", markup=False)
