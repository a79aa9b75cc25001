from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import Examples
from fedfuse.data.federate import federate
from fedfuse.data.partitions.column import Column
from fedfuse.data.partitions.dirichlet import Dirichlet
from fedfuse.data.sources.text import Text

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")


def _jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    rows = [
        {"task": "sums", "prompt": "1+1", "completion": "2", "year": 1},
        {"task": "pets", "prompt": "cat?", "completion": "yes", "year": 2},
        {"task": "sums", "prompt": "1+2", "completion": "3", "year": 1},
    ]
    _jsonl(tmp_path / "questions" / "train.jsonl", rows)
    _jsonl(tmp_path / "questions" / "test.jsonl", rows[1:2])
    return tmp_path / "questions"


def test_texts_with_labels(tmp_path: Path) -> None:
    features = {"text": {"_type": "Value"}, "label": {"_type": "ClassLabel", "names": ["bad", "good"]}}
    for part, texts, labels in (("train", ["ab", "c"], [1, 0]), ("test", ["d"], [1])):
        table = pa.table({"text": texts, "label": labels})
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        pq.write_table(table.replace_schema_metadata(metadata), tmp_path / f"{part}-0.parquet")
    data = Text(path=str(tmp_path), tokenizer="bytes", max_length=4).load()
    assert data.train.x.tolist() == [[256, 97, 98, 257], [256, 99, 257, -1]]
    assert data.train.x.dtype == torch.float32
    assert (data.train.y.tolist(), data.class_names) == ([1, 0], ("bad", "good"))
    assert data.test is not None
    assert data.test.x.tolist() == [[256, 100, 257, -1]]
    assert data.is_coded
    assert not data.is_image


def test_prompts_and_completions_by_group(questions: Path) -> None:
    data = Text(path=str(questions), tokenizer="bytes", max_length=10, group="task").load()
    assert data.class_names == ("pets", "sums")
    assert data.train.y.tolist() == [1, 0, 1]
    assert data.train.x[0, :7].tolist() == [256, 49, 43, 49, 10, 50, 257]
    assert data.train.x[0, 10:].tolist() == [0, 0, 0, 0, 0, 1, 1, 0, 0, 0]
    assert {name: column.tolist() for name, column in data.columns.items()} == {
        "task": ["sums", "pets", "sums"],
        "year": [1, 2, 1],
    }
    assert data.name == "questions"
    assert data.input_shape == (20,)
    assert data.test is not None
    assert torch.equal(data.test.x[0], data.train.x[1])


def test_without_a_group_all_are_of_one_kind(questions: Path) -> None:
    data = Text(path=str(questions), tokenizer="bytes", max_length=10).load(limit=2)
    assert (data.class_names, data.train.y.tolist()) == (("all",), [0, 0])
    assert data.columns["task"].tolist() == ["sums", "pets"]


def test_completions_alone_are_learnt_whole(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "plain.jsonl", [{"text": "ab"}, {"text": "c"}])
    with pytest.warns(UserWarning, match="has no test part"):
        data = Text(path=str(path), tokenizer="bytes", max_length=4, completion_column="text").load()
    assert data.train.x.tolist() == [[256, 97, 98, 257, 0, 1, 1, 1], [256, 99, 257, -1, 0, 1, 1, 0]]
    assert not data.columns


def test_csv_with_line_breaks_and_a_test_part_split_off(tmp_path: Path) -> None:
    lines = ['sentence,label,site\n"a, ""b""\nc",x,north'] + [f"t{i},{'xy'[i % 2]},south" for i in range(9)]
    (tmp_path / "notes.csv").write_text("\n".join(lines) + "\n")
    source = Text(path=str(tmp_path / "notes.csv"), tokenizer="bytes", max_length=12, test_fraction=0.2)
    whole, small = source.load(), source.load(limit=3, test_limit=1)
    assert whole.test is not None
    assert small.test is not None
    assert (len(whole.train), len(whole.test), whole.class_names) == (8, 2, ("x", "y"))
    texts = [bytes(int(i) for i in row if 0 <= i < 256).decode() for row in (*whole.train.x, *whole.test.x)]
    assert sorted(texts)[0] == 'a, "b"\nc'
    assert torch.equal(small.train.x, whole.train.x[:3])
    assert torch.equal(small.test.x, whole.test.x[:1])
    assert small.columns["site"].tolist() == whole.columns["site"][:3].tolist()


def test_a_limit_is_the_first_rows_with_the_classes_of_all(questions: Path) -> None:
    source = Text(path=str(questions), tokenizer="bytes", max_length=10, group="task")
    small, whole = source.load(limit=1), source.load()
    assert torch.equal(small.train.x, whole.train.x[:1])
    assert small.class_names == whole.class_names
    assert small.train.fingerprint == whole.limited(1).train.fingerprint


def test_clients_by_task_get_tokens_as_they_are(questions: Path) -> None:
    data = Text(path=str(questions), tokenizer="bytes", max_length=10, group="task").load()
    federated = federate(data, Column(column="task"), seed=0, validation_fraction=0.0)
    assert sorted(federated.clients) == ["pets", "sums"]
    assert torch.equal(federated.clients["sums"].train.x, data.train.x[[0, 2]])
    assert federated.normalization.mean == ()
    assert federated.augment == "none"


def test_dirichlet_goes_by_the_group(tmp_path: Path) -> None:
    rows = [{"task": f"t{i % 4}", "prompt": f"p{i}", "completion": "c"} for i in range(80)]
    path = _jsonl(tmp_path / "many.jsonl", rows)
    source = Text(path=str(path), tokenizer="bytes", max_length=8, group="task", test_fraction=0.1)
    data = federate(source.load(), Dirichlet(num_clients=4, dirichlet_alpha=0.1), seed=0)
    counts = data.label_counts()
    assert counts.sum() == 72
    assert (counts.max(1) / counts.sum(1)).min() > 0.5


def test_a_dataset_that_was_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["n", "p"])})
    part = datasets.Dataset.from_dict({"text": ["a", "b"], "label": [1, 0]}, features=features)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(str(tmp_path / "saved"))
    data = Text(path=str(tmp_path / "saved"), tokenizer="bytes", max_length=3).load()
    assert (data.train.x.tolist(), data.class_names) == ([[256, 97, 257], [256, 98, 257]], ("n", "p"))


def test_equal_texts_have_equal_fingerprints_in_every_kind_of_file(tmp_path: Path) -> None:
    rows = {"text": ["a", "b"], "label": ["x", "y"]}
    _jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": "x"}, {"text": "b", "label": "y"}])
    (tmp_path / "rows.csv").write_text("text,label\na,x\nb,y\n")
    pq.write_table(pa.table(rows), tmp_path / "rows.parquet")
    prints = set()
    for end in ("jsonl", "csv", "parquet"):
        with pytest.warns(UserWarning, match="has no test part"):
            found: Examples = Text(path=str(tmp_path / f"rows.{end}"), tokenizer="bytes", max_length=3).load().train
        prints.add(found.fingerprint)
    assert len(prints) == 1


def _error(kind: type[Exception], **settings: Any) -> str:
    with pytest.raises(kind) as error:
        Text(**{"tokenizer": "bytes", "max_length": 8, **settings}).load()
    return str(error.value)


def test_columns_that_are_not_there(questions: Path, tmp_path: Path) -> None:
    where = questions / "train.jsonl"
    assert _error(ConfigError, path=str(questions), prompt_column="promt") == (
        f'prompt_column: there is no column "promt"\n  where: {where}\n'
        '  fix:   did you mean "prompt"? known: completion, prompt, task, year'
    )
    assert _error(ConfigError, path=str(questions), group="tsk").startswith('group: there is no column "tsk"')
    path = _jsonl(tmp_path / "odd.jsonl", [{"body": "a", "kind": "b"}])
    assert _error(ConfigError, path=str(path)) == (
        f"no column is called text, sentence, content, document or review\n  where: {path}\n"
        "  fix:   set text_column, or prompt_column and completion_column, to one of: body, kind"
    )
    assert _error(ConfigError, path=str(path), prompt_column="body") == (
        f"no column is called completion, response, output or answer\n  where: {path}\n"
        "  fix:   set completion_column to one of: body, kind"
    )
    assert _error(ConfigError, path=str(path), text_column="body") == (
        f"no column is called label, target, class or y\n  where: {path}\n"
        "  fix:   set label_column to one of: body, kind"
    )


def test_empty_texts_and_answers_are_named_by_their_row(tmp_path: Path) -> None:
    path = _jsonl(tmp_path / "gap.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": None}])
    assert _error(DataError, path=str(path)) == (
        f'row 1 of the column "completion" is empty\n  where: {path}\n  fix:   give it a text, or take the row out'
    )
    path = _jsonl(tmp_path / "blank.jsonl", [{"text": " \n", "label": 1}])
    assert _error(DataError, path=str(path)).startswith('row 0 of the column "text" is empty\n')
    path = _jsonl(tmp_path / "number.jsonl", [{"text": 5, "label": 1}])
    assert _error(DataError, path=str(path)).startswith('row 0 of the column "text" holds 5, which is no text\n')


def test_settings_of_both_shapes_exclude_each_other() -> None:
    with pytest.raises(ConfigError) as error:
        Text(path="x", tokenizer="bytes", text_column="a", completion_column="b")
    assert str(error.value) == (
        '"a" is for texts with a label, and "b" is for prompts and completions\n  where: source\n'
        "  fix:   set text_column and label_column, or prompt_column, completion_column and group"
    )
    with pytest.raises(ConfigError, match="max_length must be at least 2, not 1"):
        Text(path="x", tokenizer="bytes", max_length=1)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    known = ".parquet, .jsonl, .json, .csv"
    gone = tmp_path / "gone.jsonl"
    assert _error(DataError, path=str(gone)) == (
        f"there is no such file or folder\n  where: {gone}\n  fix:   name a file or a folder of: {known}"
    )
    (tmp_path / "notes.txt").write_text("a")
    assert _error(DataError, path=str(tmp_path / "notes.txt")) == (
        f"the file is of no known kind\n  where: {tmp_path / 'notes.txt'}\n  fix:   name a file that ends in {known}"
    )
    (tmp_path / "empty").mkdir()
    assert _error(DataError, path=str(tmp_path / "empty")).startswith("the folder holds no table\n")
    (tmp_path / "list.json").write_text('[{"text": "a", "label": 1}]')
    assert _error(DataError, path=str(tmp_path / "list.json")).startswith("this is no JSON Lines file: ")
    _jsonl(tmp_path / "two" / "train-0.jsonl", [{"text": "a", "label": 1}])
    _jsonl(tmp_path / "two" / "train-1.jsonl", [{"text": "a"}])
    assert _error(DataError, path=str(tmp_path / "two")).startswith("the files have different columns\n")


def test_real_dialogues(shared_data: Path) -> None:
    data = Text(path=str(shared_data / "instruct"), tokenizer="bytes", max_length=64, group="task").load(
        limit=200, test_limit=10
    )
    assert (len(data.train), len(data.class_names)) == (200, 17)
    ids, flags = data.train.x.view(200, 2, 64).unbind(1)
    # Every row learns something, ends within its tokens, and learns one stretch at its end.
    assert bool((flags.sum(1) > 0).all())
    assert bool((ids[flags == 1] >= 0).all())
    assert np.all(np.diff(flags.numpy(), axis=1).clip(min=0).sum(1) == 1)


def test_answers_in_a_csv_file_are_texts_also_where_they_look_like_numbers(tmp_path: Path) -> None:
    path = tmp_path / "sums.csv"
    path.write_text("prompt,completion\n1 + 1,2.\n2 + 2,4.\n", encoding="utf-8")
    dataset = Text(path=str(path), tokenizer="bytes", max_length=12, chat_template="none", test_fraction=0.5).load()
    ids, flags = dataset.train.x[0].split(12)
    assert bytes(int(token) for token in ids[flags > 0][:-1]).decode() in ("2.", "4.")
