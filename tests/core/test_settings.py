"""Settings: to JSON and back, and errors that name the setting."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from fedfuse.core.errors import ConfigError
from fedfuse.core.settings import from_json, to_json


@dataclass(frozen=True, kw_only=True)
class Inner:
    learning_rate: float = 0.1
    sizes: tuple[int, ...] = (1, 2)

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ConfigError("learning_rate is too small", where="inner", fix="raise it")


@dataclass(frozen=True, kw_only=True)
class Outer:
    num_blocks: int
    kind: Literal["a", "b"] = "a"
    inner: Inner = Inner()
    maybe: Inner | None = None
    many: list[Inner] = field(default_factory=list)
    table: Mapping[str, float] = field(default_factory=dict)
    derived: int = field(init=False, default=5)


FULL = Outer(
    num_blocks=2, kind="b", inner=Inner(sizes=()), maybe=Inner(learning_rate=2), many=[Inner()], table={"x": 1.5}
)


@pytest.mark.parametrize("settings", [Outer(num_blocks=1), FULL])
def test_settings_come_back_from_json(settings: Outer) -> None:
    assert from_json(Outer, json.loads(json.dumps(to_json(settings))), where="method") == settings


def test_the_json_is_plain() -> None:
    assert to_json(FULL) == {
        "num_blocks": 2,
        "kind": "b",
        "inner": {"learning_rate": 0.1, "sizes": []},
        "maybe": {"learning_rate": 2, "sizes": [1, 2]},
        "many": [{"learning_rate": 0.1, "sizes": [1, 2]}],
        "table": {"x": 1.5},
    }


def test_numbers_are_turned_into_the_type_that_is_wanted() -> None:
    found = from_json(Outer, {"num_blocks": 2.0, "inner": {"learning_rate": 1}}, where="method")
    assert isinstance(found.num_blocks, int)
    assert isinstance(found.inner.learning_rate, float)


def problem(values: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        from_json(Outer, values, where="method")
    return str(caught.value)


SEE = "\n  fix:   see docs or fedfuse run --dry-run for what it can be"


def test_an_unknown_setting_is_told_the_nearest() -> None:
    assert problem({"num_blocks": 1, "kid": "a"}) == (
        'unknown setting "kid"\n  where: method.kid\n'
        '  fix:   did you mean "kind"? known: inner, kind, many, maybe, num_blocks, table'
    )


@pytest.mark.parametrize(
    ("values", "where"),
    [
        ({"inner": {"learnin_rate": 1}}, "method.inner.learnin_rate"),
        ({"maybe": {"learnin_rate": 1}}, "method.maybe.learnin_rate"),
        ({"many": [{}, {"learnin_rate": 1}]}, "method.many.1.learnin_rate"),
    ],
    ids=["nested", "optional", "list"],
)
def test_an_unknown_inner_setting_is_told_the_nearest(values: dict[str, Any], where: str) -> None:
    assert problem({"num_blocks": 1, **values}) == (
        f'unknown setting "learnin_rate"\n  where: {where}\n'
        '  fix:   did you mean "learning_rate"? known: learning_rate, sizes'
    )


def test_what_is_not_for_the_user_to_set_is_unknown() -> None:
    assert problem({"num_blocks": 1, "derived": 1}).startswith('unknown setting "derived"')


def test_a_missing_setting_is_named() -> None:
    assert problem({}) == (
        'the setting "num_blocks" is missing\n  where: method.num_blocks\n  fix:   give method.num_blocks a value'
    )


@pytest.mark.parametrize(
    ("values", "text"),
    [
        (
            {"num_blocks": "many"},
            (
                "input should be a valid integer, unable to parse string as an integer, not 'many'\n"
                "  where: method.num_blocks"
            ),
        ),
        (
            {"num_blocks": 1.5},
            "input should be a valid integer, got a number with a fractional part, not 1.5\n  where: method.num_blocks",
        ),
        ({"num_blocks": 1, "kind": "c"}, "input should be 'a' or 'b', not 'c'\n  where: method.kind"),
        (
            {"num_blocks": 1, "inner": {"sizes": ["x"]}},
            (
                "input should be a valid integer, unable to parse string as an integer, not 'x'\n"
                "  where: method.inner.sizes.0"
            ),
        ),
    ],
)
def test_a_wrong_value_is_shown_with_its_place(values: dict[str, Any], text: str) -> None:
    assert problem(values) == text + SEE


def test_a_long_value_is_cut() -> None:
    assert len(problem({"num_blocks": "x" * 10_000})) < 400


def test_a_check_of_the_settings_own_passes_through() -> None:
    assert problem({"num_blocks": 1, "inner": {"learning_rate": -1}}) == (
        "learning_rate is too small\n  where: inner\n  fix:   raise it"
    )


@dataclass(frozen=True, kw_only=True)
class OwnDefaults:
    inner: Inner = Inner(learning_rate=0.5, sizes=(7,))


def test_a_table_given_in_part_is_laid_over_the_outer_default() -> None:
    assert from_json(OwnDefaults, {"inner": {"sizes": [3]}}, where="method").inner == Inner(
        learning_rate=0.5, sizes=(3,)
    )
