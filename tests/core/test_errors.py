"""Errors: their exact text, and the nearest name."""

from __future__ import annotations

import copy

import pytest

from fedfuse.core import errors
from fedfuse.core.errors import FedfuseError, did_you_mean

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, FedfuseError)]


@pytest.mark.parametrize(
    ("where", "fix", "text"),
    [
        ("", "", "it is empty"),
        ("runs/a", "", "it is empty\n  where: runs/a"),
        ("", "fill it", "it is empty\n  fix:   fill it"),
        ("runs/a", "fill it", "it is empty\n  where: runs/a\n  fix:   fill it"),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_where_and_fix(kind: type[FedfuseError], where: str, fix: str, text: str) -> None:
    error = kind("it is empty", where=where, fix=fix)
    assert str(error) == text
    assert (error.what, error.where, error.fix) == ("it is empty", where, fix)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_says_the_same(kind: type[FedfuseError]) -> None:
    error = kind("a", where="b", fix="c")
    again = copy.copy(error)
    assert type(again) is kind
    assert str(again) == str(error)


def test_all_errors_are_of_one_family() -> None:
    assert {kind.__name__ for kind in KINDS} == {
        "FedfuseError",
        "ConfigError",
        "RegistryError",
        "PayloadError",
        "UploadRefused",
        "SealError",
        "TaskError",
        "QuorumError",
        "JournalError",
        "ArtifactError",
        "DataError",
        "ModelError",
    }


@pytest.mark.parametrize(
    ("name", "options", "wanted"),
    [
        ("fusfl", ["fusefl", "fedavg"], 'did you mean "fusefl"? known: fedavg, fusefl'),
        ("zzz", ["fusefl", "fedavg"], "known: fedavg, fusefl"),
        ("a", [], "known: none"),
        ("", ["x"], "known: x"),
    ],
)
def test_did_you_mean(name: str, options: list[str], wanted: str) -> None:
    assert did_you_mean(name, options) == wanted
    assert did_you_mean(name, set(options)) == wanted
