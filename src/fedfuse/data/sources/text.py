"""Texts: with a label each, or prompts with what is to be answered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import Examples
from fedfuse.core.registry import register_source
from fedfuse.data.arrow import ArrowPart, class_names_of, column_facts, column_values, is_scalar
from fedfuse.data.arrow_files import KINDS, file_parts
from fedfuse.data.checks import check_at_least, check_fraction, check_limit
from fedfuse.data.dataset import Dataset
from fedfuse.data.dialogues import dialogue_rows
from fedfuse.data.labels import encode_labels
from fedfuse.data.sources.huggingface import HuggingFace
from fedfuse.data.tables import check_columns, find_label
from fedfuse.data.tokenizers import Tokens, open_tokenizer

TEXT_NAMES = ("text", "sentence", "content", "document", "review")
PROMPT_NAMES = ("prompt", "instruction", "question", "input")
COMPLETION_NAMES = ("completion", "response", "output", "answer")
"""Names under which columns are found, in this order."""

NO_GROUP = "all"
"""The one class of dialogues that belong to no group."""


@register_source("text")
@dataclass(frozen=True, kw_only=True)
class Text:
    """Texts with a label each, or prompts and completions, as tokens.

    Inputs are token ids as floating point numbers, -1 after the last one. A text with a label is one row of
    ``max_length``; a long one is cut on its right. A dialogue is ``max_length`` tokens of prompt and completion, then
    as many flags, 1 where the token is to be learnt: the completion and its end. A long prompt is cut from its left,
    the completion is kept. All further columns make natural clients: ``partition: {scheme: column, column: task}``.

    Args:
        path: Parquet, JSON Lines or CSV: a file, a folder with ``train-*`` and ``test-*``, or an id on the Hugging Face
            hub.
        tokenizer: the folder of a model, an id on the hub, or ``bytes``, which needs no file; that of the model.
        max_length: most tokens of a text or a dialogue.
        text_column: column of texts to classify; found where not set.
        label_column: column of their labels; found where not set.
        prompt_column: column of prompts; found where not set. Without one, completions are learnt whole.
        completion_column: column of completions; found where not set.
        group: column of the kind of each dialogue, such as its task; partitions by label go by it. Not set makes one
            kind of all.
        chat_template: ``auto`` writes prompts by the tokenizer's own template where it has one; ``none`` writes the
            prompt and a line break.
        test_path: the file or folder of the test part, where it is not found beside the training part.
        test_fraction: share of the training part that becomes the test part where there is none, in [0, 1).
        subset: name of the subset, on the hub.
        test_split: name of the test part, on the hub; empty for none.
        dataset_name: what to call the data; the last part of the path where not set.

    Raises:
        ConfigError: a value cannot be used.
    """

    path: str
    tokenizer: str
    max_length: int = 128
    text_column: str | None = None
    label_column: str | None = None
    prompt_column: str | None = None
    completion_column: str | None = None
    group: str | None = None
    chat_template: Literal["auto", "none"] = "auto"
    test_path: str | None = None
    test_fraction: float = 0.0
    subset: str | None = None
    test_split: str = "test"
    dataset_name: str | None = None

    def __post_init__(self) -> None:
        check_fraction("source.test_fraction", self.test_fraction)
        check_at_least("source.max_length", self.max_length, 2)
        classified = self.text_column or self.label_column
        answered = self.prompt_column or self.completion_column or self.group
        if classified and answered:
            raise ConfigError(
                f'"{classified}" is for texts with a label, and "{answered}" is for prompts and completions',
                where="source",
                fix="set text_column and label_column, or prompt_column, completion_column and group",
            )

    def load(self, limit: int | None = None, test_limit: int | None = None) -> Dataset:
        """Read the data and make tokens of it.

        Args:
            limit: first training rows only.
            test_limit: first test rows only.

        Returns:
            Inputs that are codes; ``columns`` holds all columns but the texts.

        Raises:
            ConfigError: a column that was set is not there, or none can be found.
            DataError: the data or the tokenizer cannot be read, or a text is empty.
        """
        check_limit("limit", limit)
        check_limit("test_limit", test_limit)
        train, test = self._parts()
        if test is None and self.test_fraction:
            # The split must see all rows, or it would change with the limit.
            whole = self._dataset(train, None, None, None).with_test_part(self.test_fraction)
            return whole.limited(limit, test_limit)
        return self._dataset(train, test, limit, test_limit).with_test_part(0.0)

    def _parts(self) -> tuple[ArrowPart, ArrowPart | None]:
        path = Path(self.path).expanduser()
        is_saved = any((path / name).exists() for name in ("dataset_dict.json", "state.json"))
        # An id on the hub has one slash at most, and does not end like a file.
        is_id = not path.exists() and not path.is_absolute() and self.path.count("/") <= 1 and path.suffix not in KINDS
        if is_saved or (is_id and self.path[:1] not in ".~"):
            hub = HuggingFace(
                name=self.path, subset=self.subset, test_split=self.test_split, test_fraction=self.test_fraction
            )
            return hub.parts()
        test_path = None if self.test_path is None else Path(self.test_path).expanduser()
        set_ones = [name for name in (self.text_column, self.prompt_column, self.completion_column) if name]
        return file_parts(path, test_path, (*TEXT_NAMES, *PROMPT_NAMES, *COMPLETION_NAMES, *set_ones))

    def _dataset(self, train: ArrowPart, test: ArrowPart | None, limit: int | None, test_limit: int | None) -> Dataset:
        tokens = open_tokenizer(self.tokenizer)
        parts = [(train, limit)] if test is None else [(train, limit), (test, test_limit)]
        texts, label, rows = self._shape(train, tokens)
        for part, _ in parts[1:]:
            check_columns([*texts, *([label] if label else [])], part.names, "columns", where=part.where)
        # Classes are numbered over all rows, so that they do not change with a limit.
        labels = [_labels(part, label) for part, _ in parts]
        named = class_names_of(train.features.get(label)) if label else ()
        name = self.dataset_name or Path(self.path).expanduser().stem
        y, y_test, class_names = encode_labels(labels[0], labels[1] if len(labels) > 1 else None, named, where=name)
        x = [rows(part, count) for part, count in parts]
        kept = [column for column in train.names if column not in texts and is_scalar(train, column)]
        table = train.read(kept, limit)
        return Dataset(
            train=Examples(x[0], y[: len(x[0])]),
            test=None if y_test is None else Examples(x[1], y_test[: len(x[1])]),
            class_names=class_names,
            columns={column: column_facts(table, column) for column in kept},
            is_coded=True,
            name=name,
        )

    def _shape(
        self, part: ArrowPart, tokens: Tokens
    ) -> tuple[list[str], str | None, Callable[[ArrowPart, int | None], Tensor]]:
        """Columns of texts, the column of classes, and what makes rows of the texts."""
        completion = _find(part, "completion_column", self.completion_column, COMPLETION_NAMES)
        prompt = _find(part, "prompt_column", self.prompt_column, PROMPT_NAMES)
        is_answered = self.completion_column or self.prompt_column or (prompt and completion)
        if is_answered and not (self.text_column or self.label_column):
            if completion is None or completion == prompt:
                raise ConfigError(
                    f"no column is called {', '.join(COMPLETION_NAMES[:-1])} or {COMPLETION_NAMES[-1]}",
                    where=part.where,
                    fix=f"set completion_column to one of: {', '.join(part.names)}",
                )
            if self.group is not None:
                check_columns([self.group], part.names, "group", where=part.where)

            def dialogues(part: ArrowPart, limit: int | None) -> Tensor:
                asked = None if prompt is None else _texts(part, prompt, limit)
                answered = _texts(part, completion, limit)
                rows = dialogue_rows(tokens, asked, answered, self.max_length, is_chat=self.chat_template == "auto")
                return torch.from_numpy(rows)

            return [completion] if prompt is None else [prompt, completion], self.group, dialogues
        text = _find(part, "text_column", self.text_column, TEXT_NAMES)
        if text is None:
            raise ConfigError(
                f"no column is called {', '.join(TEXT_NAMES[:-1])} or {TEXT_NAMES[-1]}",
                where=part.where,
                fix=f"set text_column, or prompt_column and completion_column, to one of: {', '.join(part.names)}",
            )
        label = find_label(part.names, self.label_column, where=part.where)
        return [text], label, lambda p, limit: torch.from_numpy(tokens.encode(_texts(p, text, limit), self.max_length))


def _find(part: ArrowPart, setting: str, chosen: str | None, names: Sequence[str]) -> str | None:
    """The column that was set, or the first of the usual names."""
    if chosen is not None:
        check_columns([chosen], part.names, setting, where=part.where)
        return chosen
    return next((name for name in names if name in part.names), None)


def _labels(part: ArrowPart, column: str | None) -> np.ndarray:
    if column is None:
        return np.full(part.num_rows, NO_GROUP)
    return column_values(part.read([column], None), column, part.where)


def _texts(part: ArrowPart, column: str, limit: int | None) -> list[str]:
    values: list[str] = part.read([column], limit).column(column).to_pylist()
    for row, value in enumerate(values):
        if not isinstance(value, str) or not value.strip():
            what = "is empty" if value is None or isinstance(value, str) else f"holds {value!r}, which is no text"
            raise DataError(
                f'row {row} of the column "{column}" {what}',
                where=part.where,
                fix="give it a text, or take the row out",
            )
    return values
