"""Numbers as people read them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.report.units import (
    format_bytes,
    format_count,
    format_percent,
    format_seconds,
    natural_key,
    number,
    shorten,
)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (None, "–"),
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (100 * 1024 + 1, "100 KiB"),
        (1024**2 - 1, "1.0 MiB"),
        (1_258_291, "1.2 MiB"),
        (3 * 1024**3, "3 GiB"),
        (5000 * 1024**4, "5000 TiB"),
    ],
)
def test_bytes(num_bytes: float | None, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, "–"),
        (0, "0 s"),
        (0.0001, "< 1 ms"),
        (0.0123, "12 ms"),
        (0.9999, "1.0 s"),
        (3.21, "3.2 s"),
        (9.96, "10 s"),
        (59.6, "1 min"),
        (75, "1 min 15 s"),
        (1469, "24 min"),
        (3599, "1 h"),
        (7260, "2 h 1 min"),
    ],
)
def test_seconds(seconds: float | None, text: str) -> None:
    assert format_seconds(seconds) == text


@given(st.floats(0, 1e15))
def test_bytes_never_show_more_than_four_digits_before_the_point(num_bytes: float) -> None:
    amount, unit = format_bytes(num_bytes).split(" ")
    assert float(amount) < 1024
    assert unit in {"B", "KiB", "MiB", "GiB", "TiB"}


@given(st.floats(0, 1e7), st.floats(0, 1e7))
def test_seconds_never_show_sixty_of_a_unit(first: float, second: float) -> None:
    for text in (format_seconds(first), format_seconds(second)):
        words = text.split(" ")
        assert "60" not in words
        assert "1000" not in words or words[-1] == "min" or "h" in words


def test_counts_and_percentages() -> None:
    assert format_count(1234567) == "1,234,567"
    assert format_count(2.5) == "2.5"
    assert format_percent(0.94125) == "94.1 %"
    assert format_percent(0.94125, 0) == "94 %"
    assert format_percent(None) == format_count(None) == "–"


@pytest.mark.parametrize("value", [None, True, "3", float("nan"), float("inf"), [1], {}])
def test_what_is_no_finite_number_is_none(value: object) -> None:
    assert number(value) is None


@given(st.lists(st.text(max_size=12), max_size=8))
def test_natural_order_is_an_order_of_any_names(names: list[str]) -> None:
    once = sorted(names, key=natural_key)
    backwards = once[::-1]
    again = sorted(backwards, key=natural_key)
    assert [natural_key(name) for name in again] == [natural_key(name) for name in once]


def test_natural_order_counts() -> None:
    names = ["client_10", "client_2", "client_1"]
    assert sorted(names, key=natural_key) == ["client_1", "client_2", "client_10"]


@given(st.text(max_size=80), st.integers(2, 40))
def test_shortened_text_is_one_line_of_at_most_the_length(text: str, length: int) -> None:
    short = shorten(text, length)
    assert len(short) <= length
    assert "\n" not in short
