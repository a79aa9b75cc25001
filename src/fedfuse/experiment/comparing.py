"""Several methods on the same data and models; every client trains once per question."""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from fedfuse.core import VERSION
from fedfuse.core.errors import ConfigError
from fedfuse.core.files import write_atomically
from fedfuse.core.method import Method
from fedfuse.core.registry import METHODS
from fedfuse.core.settings import to_json
from fedfuse.experiment.configuration import Config, ConfigLike, NamedSection, named, override, read_config, resolve
from fedfuse.experiment.result import Observer
from fedfuse.experiment.running import run_method, versions
from fedfuse.experiment.setting import Loader, Setting


def compare(
    config: ConfigLike,
    methods: str | Sequence[str | Mapping[str, Any] | Method] = (),
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
    if isinstance(methods, str):
        methods = split_outside_brackets(methods)
    entries = [_method_entry(entry, checked) for entry in (methods or checked.methods)]
    if not entries:
        raise ConfigError(
            "there is nothing to compare",
            where="methods",
            fix="give --methods a,b,c or a list methods: in the configuration",
        )
    labels = [label for label, _ in entries]
    slugs = [_slug(label) for label in labels]
    twice = next((label for label, slug in zip(labels, slugs, strict=True) if slugs.count(slug) > 1), None)
    if twice is not None:
        raise ConfigError(f'the method "{twice}" is given twice', where="methods", fix="give each a label of its own")
    folder = None if out is None else Path(out)
    numbers = [checked.seed + k for k in range(seeds)] if isinstance(seeds, int) else list(seeds)
    if not numbers:
        raise ConfigError("there is no seed to run", where="seeds", fix="give at least 1")
    # Every method's settings are checked before the first client trains.
    configs = {label: checked.model_copy(update={"method": NamedSection(**section)}) for label, section in entries}
    resolved = {label: resolve(one) for label, one in configs.items()}
    loader = Loader(checked)
    results: dict[str, list[Mapping[str, Any]]] = {label: [] for label in labels}
    board: dict[str, Any] = {}
    position = 0
    with ExitStack() as stack:
        home = folder
        if home is None:
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
                    method = named(METHODS, configs[label].method.name, configs[label].method.others, "method")
                    result = run_method(
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
        name, bracket, rest = entry.strip().partition("[")
        if bracket and not rest.endswith("]"):
            raise ConfigError(f'"{entry}" lacks its closing bracket', where="methods", fix="write name[key=value,...]")
        section, label = {"name": name.strip()}, entry.strip()
        for text in split_outside_brackets(rest.removesuffix("]")):
            section = override(section, text, where="methods")
    elif isinstance(entry, Mapping) and isinstance(entry.get("name"), str):
        section = dict(entry)
        label = str(section.pop("label", section["name"]))
    else:
        raise ConfigError(f"a method has no name: {str(entry)[:60]}", where="methods", fix="write {name: fusefl, ...}")
    base = config.method
    known = getattr(METHODS.get(str(section["name"])), "__dataclass_fields__", {})
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
    slug = re.sub(r"[^A-Za-z0-9_.=-]+", "_", label).strip("_.") or "method"
    # The comparison's own folders stand beside those of the methods.
    return f"{slug}_method" if slug in ("journal", "clients", "figures") else slug


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
