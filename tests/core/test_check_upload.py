"""Uploads that are refused, word for word."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.core.errors import UploadRefused
from fedfuse.core.expecting import TensorSpec, check_upload
from fedfuse.core.payload import Payload

DECLARED = {"w/*": "weights", "n": "how many", "curve/*": "curves"}
EXPECT: dict[str, Any] = {"w/x": TensorSpec((2, None)), "n": int}
GOOD: dict[str, Any] = {"w/x": torch.zeros(2, 3), "n": 1}


def check(values: Mapping[str, Any] | bytes, expect: Any = EXPECT, limit: int = 1 << 30) -> None:
    data = values if isinstance(values, bytes) else Payload(values).encode()
    check_upload("c", data, DECLARED, expect, limit)


def refusal(values: Mapping[str, Any] | bytes, expect: Any = EXPECT, limit: int = 1 << 30) -> str:
    with pytest.raises(UploadRefused) as caught:
        check(values, expect, limit)
    text = str(caught.value).removeprefix("the upload was refused: ")
    return text.removesuffix("\n  fix:   the client must send what the task declares")


@pytest.mark.parametrize(
    "expect",
    [
        None,
        EXPECT,
        {"w/x": TensorSpec((2, 3)), "n": int},
        {"w/x": TensorSpec((None, None)), "n": int},
        {"w/x": torch.ones(2, 3), "n": int},
    ],
)
def test_a_good_upload_passes(expect: Any) -> None:
    check(GOOD, expect)
    check({**GOOD, "curve/loss": torch.ones(2)}, expect)


def test_an_empty_upload_passes_where_nothing_is_expected() -> None:
    check({}, None)
    check({}, {})


@pytest.mark.parametrize(
    ("change", "reason", "key"),
    [
        ({"secret": 1}, "the key was not declared", "secret"),
        ({"secret": torch.zeros(1)}, "the key was not declared", "secret"),
        ({"w/y": torch.zeros(1)}, "the key was not expected", "w/y"),
        ({"w/x": torch.zeros(2)}, "its shape is (2,), wanted (2, None)", "w/x"),
        ({"w/x": torch.zeros(3, 3)}, "its shape is (3, 3), wanted (2, None)", "w/x"),
        ({"w/x": torch.zeros(())}, "its shape is (), wanted (2, None)", "w/x"),
        ({"w/x": torch.zeros(2, 3).double()}, "its dtype is torch.float64, wanted torch.float32", "w/x"),
        ({"w/x": torch.tensor([[1.0], [math.nan]])}, "it holds NaN or infinite values", "w/x"),
        ({"w/x": torch.tensor([[1.0], [math.inf]])}, "it holds NaN or infinite values", "w/x"),
        ({"w/x": 1.5}, "it is a float, wanted a tensor", "w/x"),
        ({"n": torch.zeros(())}, "it is a tensor, wanted a int", "n"),
        ({"n": 1.0}, "it is a float, wanted a int", "n"),
        ({"n": True}, "it is a bool, wanted a int", "n"),
        ({"n": "1"}, "it is a str, wanted a int", "n"),
        ({"n": math.nan}, "it holds NaN or infinite values", "n"),
        ({"n": -math.inf}, "it holds NaN or infinite values", "n"),
        ({"curve/loss": torch.tensor([math.nan])}, "it holds NaN or infinite values", "curve/loss"),
    ],
)
def test_a_bad_value_is_named_with_client_key_and_reason(change: dict[str, Any], reason: str, key: str) -> None:
    assert refusal({**GOOD, **change}) == f"{reason}\n  where: client c, key '{key}'"


@pytest.mark.parametrize("key", ["w/x", "n"])
def test_a_missing_key_is_named(key: str) -> None:
    values = {name: value for name, value in GOOD.items() if name != key}
    assert refusal(values) == f"the key is missing\n  where: client c, key '{key}'"
    assert refusal({}) == "the key is missing\n  where: client c, key 'n'"


def test_without_an_expectation_keys_and_finite_values_are_still_checked() -> None:
    assert refusal({"secret": 1}, None) == "the key was not declared\n  where: client c, key 'secret'"
    assert refusal({"n": math.nan}, None) == "it holds NaN or infinite values\n  where: client c, key 'n'"
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        values = {"w/x": torch.tensor([1.0, math.inf], dtype=dtype)}
        assert refusal(values, None) == "it holds NaN or infinite values\n  where: client c, key 'w/x'"


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("expect", [None, EXPECT], ids=["no_expectation", "expectation"])
def test_a_dtype_that_torch_can_hardly_compute_with_costs_only_the_client(dtype: torch.dtype, expect: Any) -> None:
    values = {**GOOD, "w/x": torch.zeros(2, 3).to(dtype)}
    if expect is None:
        check(values, None)
        values["w/x"] = torch.full((2, 3), math.nan).to(dtype)
        assert refusal(values, None) == "it holds NaN or infinite values\n  where: client c, key 'w/x'"
    else:
        assert refusal(values) == f"its dtype is {dtype}, wanted torch.float32\n  where: client c, key 'w/x'"


# --- size


def test_the_operators_limit() -> None:
    data = Payload(GOOD).encode()
    check(data, None, len(data))
    assert refusal(data, None, len(data) - 1) == (
        f"{len(data)} bytes are more than the limit of {len(data) - 1}\n  where: client c"
    )
    assert refusal({"w/x": torch.zeros(500)}, None, 1000).startswith("2,")
    assert "more than the limit of 1,000\n" in refusal({"w/x": torch.zeros(500)}, None, 1000)


def test_more_than_twice_what_is_expected_is_refused_before_it_is_read() -> None:
    expect = {"w/x": TensorSpec((2, 3))}
    limit = 2 * 24 + (1 << 20)
    check(Payload({"w/x": torch.zeros(2, 3)}).encode(), expect)
    assert refusal(b"\0" * (limit + 1), expect) == (
        f"{limit + 1:,} bytes are more than the limit of {limit:,}\n  where: client c"
    )


def test_sizes_without_an_element_may_not_be_beyond_the_limit() -> None:
    # Eighty bytes of header; a mean over the first dimension would take four tebibytes.
    for shape, dtype in (((0, 1 << 40), torch.float32), ((1 << 18, 0, 1 << 10), torch.uint8)):
        assert refusal({"w/x": torch.zeros(shape, dtype=dtype)}, None, 1 << 20) == (
            f"its shape {shape} has no element and sizes beyond the limit of 1,048,576 bytes\n"
            "  where: client c, key 'w/x'"
        )
    check({"w/x": torch.zeros(0, 1 << 18)}, None, 1 << 20)


def test_a_curve_is_no_place_for_bulk() -> None:
    # Curves are written into metrics.jsonl as numbers.
    data = Payload({"curve/loss": torch.zeros((1 << 16) + 1)}).encode()
    with pytest.raises(UploadRefused) as caught:
        check_upload("c", data, {"curve/*": "x"}, None, 1 << 30)
    assert caught.value.what == "the upload was refused: a curve of 65,537 points is longer than 65,536"
    check_upload("c", Payload({"curve/loss": torch.zeros(1 << 16)}).encode(), {"curve/*": "x"}, None, 1 << 30)


def test_holes_are_found_in_every_part_of_a_long_tensor() -> None:
    for position in (0, (1 << 22) - 1, 1 << 22, (1 << 22) + 6):
        values = torch.zeros((1 << 22) + 7)
        values[position] = math.nan
        assert refusal({"w/x": values}, None, 1 << 30).startswith("it holds NaN or infinite values\n")


# --- bytes


def test_bytes_that_are_no_payload() -> None:
    data = Payload(GOOD).encode()
    assert refusal(b"x") == "the bytes are not a payload: 1 bytes with a header of 120\n  where: client c"
    assert refusal(data[:-1]) == (
        "the bytes are not a payload: its tensors take 24 bytes, 23 are there\n  where: client c"
    )


def test_an_undeclared_tensor_is_found_in_the_header_already() -> None:
    entry = {"dtype": "F32", "shape": [1 << 60], "data_offsets": [0, 1 << 62]}
    text = json.dumps({"secret": entry}).encode()
    data = len(text).to_bytes(8, "little") + text
    assert refusal(data, None) == "the key was not declared\n  where: client c, key 'secret'"


def test_an_undeclared_key_is_cut_and_escaped_in_the_message() -> None:
    text = json.dumps({"x\n" * 300: 1}).encode()
    where = refusal(len(text).to_bytes(8, "little") + text, None).split("where: ")[1]
    assert "\n" not in where
    assert len(where) < 150


@given(st.binary(max_size=120))
def test_any_bytes_pass_or_are_refused(data: bytes) -> None:
    for each in (data, len(data).to_bytes(8, "little") + data):
        try:
            check(each, None)
        except UploadRefused:
            pass


def test_every_damaged_byte_passes_or_is_refused() -> None:
    data = Payload(GOOD).encode()
    for position in range(len(data)):
        for flip in (0x01, 0xFF):
            try:
                check(data[:position] + bytes([data[position] ^ flip]) + data[position + 1 :], None)
            except UploadRefused:
                pass
