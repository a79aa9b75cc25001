from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.data.sources.csv_table import Csv

TEXT = "age,colour,site,label\n1,red,n,yes\n2,blue,,no\n3,red,s,yes\n"


def _file(tmp_path: Path, text: str, name: str = "t.csv") -> str:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return str(tmp_path / name)


def test_numbers_and_categories(tmp_path: Path) -> None:
    test = _file(tmp_path, "label,age,colour\nno,9,green\n", "test.csv")
    data = Csv(path=_file(tmp_path, TEXT), test_path=test, ignore_columns=("site",)).load()
    assert data.train.x.tolist() == [[1, 0, 1], [2, 1, 0], [3, 0, 1]]
    assert data.train.y.tolist() == [1, 0, 1]
    assert data.test is not None
    assert data.test.x.tolist() == [[9, 0, 0]]
    assert data.test.y.tolist() == [0]
    assert data.class_names == ("no", "yes")
    assert data.columns["site"].tolist() == ["n", "missing", "s"]
    assert data.columns["age"].tolist() == [1, 2, 3]
    assert data.name == "t"


def test_limits_and_separators(tmp_path: Path) -> None:
    text = "a;b;target\n" + "".join(f"{row};{row}.5;{row % 2}\n" for row in range(10))
    data = Csv(path=_file(tmp_path, text), separator=";", test_fraction=0.2).load(limit=3)
    assert len(data.train) == 3
    assert len(data.test or ()) == 2
    assert data.input_shape == (2,)
    assert data.class_names == ("0", "1")


@pytest.mark.parametrize(
    ("text", "settings", "error", "message"),
    [
        ("", {}, DataError, "the file holds no rows"),
        ("a,label\n", {}, DataError, "the file holds no rows"),
        ("a,label\n1\n", {}, DataError, "line 2 has 1 values for 2 columns"),
        ("a,a,label\n1,2,0\n", {}, DataError, 'two columns are called "a"'),
        ("a,label\n1,0\n,1\n", {}, DataError, 'the column "a" has no value in line 3'),
        ("a,label\n1,0\nNaN,1\n", {}, DataError, 'the column "a" has no value in line 3: NaN'),
        ("a,label\n1,0\ninf,1\n", {}, DataError, 'the column "a" has no finite number in row 1'),
        ("a,label\n1,\n", {}, DataError, 'the column "label" has no value in line 2'),
        ("a,label\n1,0.5\n", {}, DataError, "the labels are not classes: row 0 holds 0.5"),
        ("a,kind\n1,0\n", {}, ConfigError, "no column is called label, target, class or y"),
        ("a,label\n1,0\n", {"label_column": "lab"}, ConfigError, 'label_column: there is no column "lab"'),
        (
            "a,label\nx,0\ny,0\nz,0\n",
            {"max_categories": 2},
            DataError,
            'the column "a" holds texts (3 different ones, more than max_categories=2)',
        ),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, text: str, settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error) as caught:
        Csv(path=_file(tmp_path, text), **settings).load()
    assert caught.value.what == message  # type: ignore[attr-defined]


def test_files_and_settings_are_checked(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        Csv(path=str(tmp_path / "none.csv")).load()
    (tmp_path / "latin.csv").write_bytes(b"a,label\n\xff,1\n")
    with pytest.raises(DataError, match="the file cannot be read"):
        Csv(path=str(tmp_path / "latin.csv")).load()
    with pytest.raises(ConfigError, match="separator must be one character, not ''"):
        Csv(path="x", separator="")
    with pytest.raises(DataError, match='there is no column "age"'):
        Csv(
            path=_file(tmp_path, TEXT), test_path=_file(tmp_path, "label\nno\n", "u.csv"), ignore_columns=("site",)
        ).load()
