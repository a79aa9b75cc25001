"""``fedfuse evaluate``: how good an artifact is on data, or at the tasks of the lm-eval harness."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedfuse.core.artifact import Artifact
from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import Examples
from fedfuse.core.files import write_atomically
from fedfuse.core.judging import Evaluation, Generates, JudgesItself
from fedfuse.core.registry import SOURCES
from fedfuse.data.dataset import Dataset
from fedfuse.data.labels import Numbering
from fedfuse.data.tokenizers import open_tokenizer
from fedfuse.experiment.configuration import named, override
from fedfuse.experiment.contributing import source_of_path
from fedfuse.report.wording import metric, metric_name
from fedfuse.training import evaluate
from fedfuse.training.harness import TextScorer, run_tasks

_LONGEST = 2048


def evaluate_artifact(
    path: Path,
    data: str = "",
    *,
    source: str = "",
    settings: Sequence[str] = (),
    num_answers: int | None = None,
    tasks: Sequence[str] = (),
    task_folder: Path | None = None,
    limit: int | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Score an artifact.

    Args:
        path: its folder, or a run's.
        data: file, folder or hub id of the data; its test part is used, all of it where it has none.
        source: how the data are read; told by the artifact and the name where left out.
        settings: of that source, ``key=value``.
        num_answers: prompts whose answers a language model writes; as when it was trained if left out.
        tasks: of the lm-eval harness.
        task_folder: folder of further tasks.
        limit: first examples only, of the data and of each task.
        device: where it computes.

    Returns:
        ``data``: the scores on the data; ``tasks``: those of each task.

    Raises:
        ConfigError: there is nothing to do, or a setting cannot be used.
        DataError: the data do not fit the artifact.
        ArtifactError: there is no artifact.
    """
    if not data and not tasks:
        raise ConfigError("nothing says what to evaluate on", where="fedfuse evaluate", fix="give --data or --lm-eval")
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device", where="--device", fix="use cpu")
    artifact = Artifact.read(path if (path / "fused.json").exists() else path / "artifact")
    module = artifact.module().to(device)
    found: dict[str, Any] = {}
    if data:
        if num_answers is not None and isinstance(module, Generates):
            module.num_generated = num_answers
        dataset = _read(artifact, data, source, settings)
        part = "test part" if dataset.test is not None else "all examples"
        examples = dataset.test if dataset.test is not None else dataset.train
        examples = Examples(examples.x[:limit], examples.y[:limit])
        _check_shape(artifact, examples)
        if not isinstance(module, JudgesItself):
            examples = _numbered(artifact, dataset, examples)
        seen = evaluate(module, examples, device=device, writes_answers=True)
        found["data"] = {"name": dataset.name, "part": part, "num_examples": len(examples), **_scores(seen)}
    if tasks:
        found["tasks"] = run_tasks(_scorer(module), tasks, limit=limit, task_folder=task_folder)
    return found


def tell(found: Mapping[str, Any], out: Path | None = None) -> None:
    """Print scores as a table, and write them.

    Args:
        found: as :func:`evaluate_artifact` gives them.
        out: file of JSON; ``None`` writes none.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    groups: dict[str, Mapping[str, float]] = dict(found.get("tasks", {}))
    if "data" in found:
        facts = dict(found["data"])
        title = f"{facts.pop('name')}, {facts.pop('part')}: {facts.pop('num_examples'):,} examples"
        groups = {title: facts, **groups}
    for title, scores in groups.items():
        console.print(f"[italic]{escape(title)}[/italic]")
        table = Table(show_header=False, box=None, pad_edge=False)
        table.add_column(style="dim")
        table.add_column(justify="right")
        for name, value in scores.items():
            shares = name == "accuracy" or title not in found.get("tasks", {})
            shown = metric("exact_match", value) if name == "accuracy" else metric(name, value)
            table.add_row(metric_name(name), shown if shares else f"{value:.4f}")
        console.print(table)
    if out is not None:
        write_atomically(out, (json.dumps(found, indent=2, sort_keys=True) + "\n").encode())
        console.print(f"wrote {escape(str(out))}")


def _read(artifact: Artifact, data: str, source: str, settings: Sequence[str]) -> Dataset:
    path = Path(data).expanduser()
    reads_text = _told(artifact.recipe, "tokenizer") is not None
    name = source or ("text" if reads_text and path.suffix != ".npz" else source_of_path(path))
    table: dict[str, Any] = {"name" if name == "huggingface" else "path": data}
    if name == "text":
        table.update(_text_settings(artifact))
    for text in settings:
        table = override(table, text)
    if name == "text" and "tokenizer" not in table:
        raise ConfigError(
            "nothing says what makes tokens of the texts",
            where="--data",
            fix="--set tokenizer=FOLDER, that of the model",
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*has no test part")
        loaded: Dataset = named(SOURCES, name, table, "--data", "source").load()
    return loaded


def _text_settings(artifact: Artifact) -> dict[str, Any]:
    """What the artifact tells of its texts."""
    settings: dict[str, Any] = {}
    if _told(artifact.recipe, "tokenizer"):
        settings["tokenizer"] = _told(artifact.recipe, "tokenizer")
    shape = artifact.info.get("input_shape")
    if shape:
        settings["max_length"] = shape[0] // (2 if _told(artifact.recipe, "task") == "causal_lm" else 1)
    return settings


def _told(recipe: Any, name: str) -> Any:
    """A setting of a recipe, or of the first recipe within it that has it; ``None`` where none has."""
    if isinstance(recipe, Mapping):
        if name in recipe:
            return recipe[name]
        return next((found for part in recipe.values() if (found := _told(part, name)) is not None), None)
    if isinstance(recipe, list):
        return next((found for part in recipe if (found := _told(part, name)) is not None), None)
    return None


def _check_shape(artifact: Artifact, examples: Examples) -> None:
    shape, own = artifact.info.get("input_shape"), list(examples.x.shape[1:])
    if shape and own != list(shape):
        raise DataError(
            f"the inputs have shape {tuple(own)}, and the model takes {tuple(shape)}",
            where="--data",
            fix="read them as the model's own data were read; give settings of the source by --set",
        )


def _numbered(artifact: Artifact, dataset: Dataset, examples: Examples) -> Examples:
    """Labels as numbers of the model's classes, found by their names."""
    class_names = artifact.info.get("class_names")
    if not class_names:
        return examples
    number = Numbering(tuple(class_names))
    numbers = torch.full((dataset.num_classes,), -1)
    for y in examples.y.unique().tolist():
        name = dataset.class_names[y]
        numbers[y] = number(int(name) if name.isdecimal() and name not in class_names else name)
    return Examples(examples.x, numbers[examples.y])


def _scores(seen: Evaluation) -> dict[str, float]:
    return {"accuracy": seen.accuracy, "loss": seen.loss, **dict(sorted(seen.metrics.items()))}


def _scorer(module: nn.Module) -> TextScorer:
    name = getattr(module, "tokenizer", "")
    if isinstance(module, Generates) and not name:
        raise ConfigError(
            "nothing says what makes tokens of the tasks' texts",
            where="--lm-eval",
            fix="set model.tokenizer when the model is trained",
        )
    config = getattr(getattr(module, "net", None), "config", None)
    longest = min(int(getattr(config, "max_position_embeddings", None) or _LONGEST), _LONGEST)
    # A module that writes no text is refused before its tokenizer is looked for.
    return TextScorer(module, open_tokenizer(name or "bytes"), longest)
