"""Several methods on the same data and models; every client trains once per question."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfuse.core import VERSION
from fedfuse.core.errors import ConfigError
from fedfuse.core.files import write_atomically
from fedfuse.core.method import Method
from fedfuse.core.registry import METHODS
from fedfuse.core.settings import to_json
from fedfuse.experiment.configuration import (
    Config,
    ConfigLike,
    NamedSection,
    folder_name,
    named,
    override,
    read_config,
    resolve,
)
from fedfuse.experiment.result import Observer
from fedfuse.experiment.running import run_method, versions
from fedfuse.experiment.setting import Loader, Setting
from fedfuse.experiment.variations import (
    combinations,
    folder_of,
    read_variations,
    setting_folders,
    split_outside_brackets,
)


def compare(
    config: ConfigLike,
    methods: str | Sequence[str | Mapping[str, Any] | Method] = (),
    *,
    seeds: int | Sequence[int] = 1,
    overrides: Sequence[str] = (),
    vary: Mapping[str, Sequence[Any]] | Sequence[str] = (),
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
        vary: settings to several values each, such as ``{"data.partition.dirichlet_alpha": [0.1, 0.5]}``, or texts
            ``section.key=value,value``: everything is run with each value, of several settings with each pair of
            values, in a folder of its own.
        out: the comparison's folder. The same command continues there after a crash.
        observer: hears how far it is.

    Returns:
        The board, as in ``board.json``: ``{"rows": [{"method": ..., "accuracy_mean": ..., ...}], ...}``. Where
        settings were varied, each row has its values under ``varied``.

    Raises:
        ConfigError: there is nothing to compare, or a method or a value is given twice.
    """
    observer = observer or Observer()
    checked = read_config(config, overrides)
    varied = read_variations(vary)
    numbers = [checked.seed + k for k in range(seeds)] if isinstance(seeds, int) else list(seeds)
    if not numbers:
        raise ConfigError("there is no seed to run", where="seeds", fix="give at least 1")
    # Every method's settings are checked, with every value, before the first client trains.
    plans = [_plan(checked, methods, values) for values in combinations(varied)]
    with ExitStack() as stack:
        home = None if out is None else Path(out)
        if home is None:
            home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="fedfuse-")))
        if not varied:
            return _run_plan(plans[0], numbers, home, observer, progress=(0, len(numbers) * len(plans[0].configs)))
        board: dict[str, Any] = {}
        finished: list[dict[str, Any]] = []
        slugs = setting_folders([plan.varied for plan in plans])
        loader: Loader | None = None
        total = len(plans) * len(numbers) * len(plans[0].configs)
        for index, (plan, slug) in enumerate(zip(plans, slugs, strict=True)):
            # Settings that read the same files share what was read.
            loader = Loader(plan.config, like=loader)
            done = index * (total // len(plans))
            part = _run_plan(plan, numbers, home / slug, observer, progress=(done, total), loader=loader)
            for row in part["rows"]:
                runs = [f"{slug}/{run}" for run in row["runs"]]
                finished.append({**row, "varied": dict(plan.varied), "runs": runs})
            board = {
                **part,
                "rows": finished,
                "varied": {key: list(values) for key, values in varied.items()},
                "boards": slugs[: index + 1],
                "config": plans[0].first,
            }
            write_atomically(home / "board.json", json.dumps(board, indent=1).encode())
    return board


@dataclass(frozen=True)
class _Plan:
    """One comparison: the methods on one setting.

    Args:
        config: the configuration of the setting.
        configs: label to the configuration of one method.
        resolved: label to the same, whole.
        varied: the settings that make this comparison differ from its sisters.
    """

    config: Config
    configs: Mapping[str, Config]
    resolved: Mapping[str, Mapping[str, Any]]
    varied: Mapping[str, Any]

    @property
    def first(self) -> dict[str, Any]:
        return dict(next(iter(self.resolved.values())))


def _plan(
    config: Config, methods: str | Sequence[str | Mapping[str, Any] | Method], varied: Mapping[str, Any]
) -> _Plan:
    table: Mapping[str, Any] = config.model_dump()
    for key, value in varied.items():
        table = override(table, f"{key}={json.dumps(value)}", where="vary")
    checked = read_config(table)
    if isinstance(methods, str):
        methods = split_outside_brackets(methods)
    entries = [method_entry(entry, checked) for entry in (methods or checked.methods)]
    if not entries:
        raise ConfigError(
            "there is nothing to compare",
            where="methods",
            fix="give --methods a,b,c or a list methods: in the configuration",
        )
    slugs = [folder_of(label) for label, _ in entries]
    twice = next((label for (label, _), slug in zip(entries, slugs, strict=True) if slugs.count(slug) > 1), None)
    if twice is not None:
        raise ConfigError(f'the method "{twice}" is given twice', where="methods", fix="give each a label of its own")
    configs = {label: checked.model_copy(update={"method": NamedSection(**section)}) for label, section in entries}
    return _Plan(checked, configs, {label: resolve(one) for label, one in configs.items()}, varied)


def _run_plan(
    plan: _Plan,
    seeds: Sequence[int],
    home: Path,
    observer: Observer,
    *,
    progress: tuple[int, int],
    loader: Loader | None = None,
) -> dict[str, Any]:
    """Run what is not there yet; the board is written anew after every run."""
    loader = loader or Loader(plan.config)
    results: dict[str, list[Mapping[str, Any]]] = {label: [] for label in plan.configs}
    board: dict[str, Any] = {}
    position, total = progress
    observer.comparison_started(list(plan.configs), list(seeds), plan.varied)
    for seed in seeds:
        setting: Setting | None = None
        for label, config in plan.configs.items():
            position += 1
            observer.run_started(label, seed, position, total)
            run_folder = home / folder_of(label) / f"seed_{seed}"
            table = {**plan.resolved[label], "seed": seed}
            facts: Mapping[str, Any] | None = _finished(run_folder, table)
            if facts is not None:
                observer.run_found(label, seed, facts)
            else:
                setting = setting or loader.setting(seed)
                result = run_method(
                    setting,
                    named(METHODS, config.method.name, config.method.others, "method"),
                    config,
                    table,
                    label=label,
                    folder=run_folder,
                    observer=observer,
                    shared=home,
                    seed=seed,
                )
                facts = result.facts
            results[label].append({**facts, "run": f"{folder_of(label)}/seed_{seed}"})
            board = _board(results, plan.first, seeds)
            write_atomically(home / "board.json", json.dumps(board, indent=1).encode())
    return board


def comparison_name(config: Config, varied: Mapping[str, Sequence[Any]]) -> str:
    """A name for a comparison's folder that is the same for the same question, so that the same command continues.

    Args:
        config: the configuration.
        varied: settings that are varied; further values join those that are there.
    """
    return "-by-".join([f"compare-{folder_name(config)}", *varied])


def method_entry(entry: str | Mapping[str, Any] | Method, config: Config) -> tuple[str, dict[str, Any]]:
    """Label and section of one method that takes the place of the configuration's.

    Args:
        entry: a name, ``name[key=value,...]``, a table with an optional ``label``, or a method object.
        config: its method's local training holds for the other too.

    Raises:
        ConfigError: the entry names no method.
    """
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
                **_known_facts(runs[0]),
                "accuracy_mean": statistics.fmean(scores) if scores else None,
                "accuracy_std": (statistics.stdev(scores) if len(scores) > 1 else 0.0) if scores else None,
                "accuracies": scores,
                **_attack_facts(runs),
                **_metric_facts(runs),
                "num_seeds": len(runs),
                **{name: statistics.fmean(run["ledger"][name] for run in runs) for name in names},
                "runs": [run["run"] for run in runs],
            }
        )
    return {"rows": rows, "seeds": list(seeds), "config": dict(config), "versions": versions()}


def _metric_facts(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and spread of the scores beside the accuracy."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for name, value in run.get("metrics", {}).items():
            found.setdefault(name, []).append(value)
    if not found:
        return {}
    return {
        "metrics_mean": {name: statistics.fmean(values) for name, values in found.items()},
        "metrics_std": {name: statistics.stdev(values) if len(values) > 1 else 0.0 for name, values in found.items()},
    }


def _attack_facts(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How far attackers came, and how many clients looked wrong, where runs were attacked."""
    if "attack" not in runs[0]:
        return {}
    rates = [run["attack"]["success"] for run in runs if run["attack"]["success"] is not None]
    hostile, honest = 0, 0
    for run in runs:
        suspects = {suspect["client"] for suspect in run["suspects"]}
        hostile += len(suspects & set(run["attack"]["clients"]))
        honest += len(suspects - set(run["attack"]["clients"]))
    return {
        "attack_success_mean": statistics.fmean(rates) if rates else None,
        "num_hostile_suspects": hostile,
        "num_honest_suspects": honest,
    }


def _known_facts(run: Mapping[str, Any]) -> dict[str, Any]:
    """What an adviser must know of a method besides what was measured."""
    name = run["config"]["method"]["name"]
    method = METHODS.get(name)
    return {
        "name": name,
        "needs_server_data": method.needs_server_data,
        "takes_heterogeneous": method.takes_heterogeneous,
        "used_server_data": run.get("used_server_data"),
    }
