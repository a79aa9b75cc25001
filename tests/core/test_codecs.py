"""Codecs against numbers that a reader can redo by hand, and against bytes from anybody."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedfuse.core.codecs import Codec, Int8, Ternary, TopK
from fedfuse.core.codecs.packing import pack, pack_places, unpack, unpack_places
from fedfuse.core.errors import ConfigError, FedfuseError, PayloadError
from fedfuse.core.registry import CODECS, register_codec

ALL: list[Codec] = [Int8(), Int8(scale_per="tensor", rounding="stochastic"), TopK(), TopK(fraction=0.9), Ternary()]


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def coded(codec: Codec, values: Tensor, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return codec.decode(codec.encode(values.double(), dtype, draw(seed)), tuple(values.shape))


def test_the_codecs_are_registered_under_their_names() -> None:
    assert {"int8", "topk", "ternary"} <= set(CODECS.names())
    assert CODECS.get("topk") is TopK
    with pytest.raises(FedfuseError, match='there is no codec "in8"'):
        CODECS.get("in8")
    register_codec("int8")(Int8)  # the same thing twice is no conflict
    with pytest.raises(FedfuseError, match='the codec "int8" is registered twice'):
        register_codec("int8")(TopK)


def test_int8_rounds_each_row_to_127_steps_of_its_largest_entry() -> None:
    parts = Int8().encode(torch.tensor([[1.27, -0.504], [0.0, 0.0]], dtype=torch.float64), torch.float32, draw())

    assert parts["steps"].tolist() == [[127, -50], [0, 0]]
    assert parts["scales"].tolist() == pytest.approx([0.01, 0.0])
    assert Int8().decode(parts, (2, 2)).flatten().tolist() == pytest.approx([1.27, -0.5, 0.0, 0.0])


def test_int8_takes_one_scale_for_a_vector_or_where_it_is_told_so() -> None:
    matrix = torch.tensor([[1.27, 0.0], [0.0127, 0.0]], dtype=torch.float64)

    assert len(Int8().encode(matrix[0], torch.float32, draw())["scales"]) == 1
    whole = Int8(scale_per="tensor").encode(matrix, torch.float32, draw())
    assert whole["steps"].tolist() == [[127, 0], [1, 0]]
    assert whole["scales"].shape == (1,)


def test_stochastic_rounding_is_right_in_the_mean() -> None:
    # The scale is 1 / 127 of 1.27; 0.0025 lies a quarter of the way from 0 to the first step of 0.01.
    values = torch.full((40_001,), 0.0025, dtype=torch.float64)
    values[0] = 1.27
    found = coded(Int8(rounding="stochastic"), values)[1:]

    assert {round(value, 4) for value in found.unique().tolist()} == {0.0, 0.01}
    assert found.mean().item() == pytest.approx(0.0025, abs=5 * 0.01 * math.sqrt(0.25 * 0.75 / 40_000))
    assert torch.equal(found, coded(Int8(rounding="stochastic"), values)[1:])
    assert not torch.equal(found, coded(Int8(rounding="stochastic"), values, seed=1)[1:])


def test_topk_keeps_the_largest_and_of_equal_ones_the_first() -> None:
    values = torch.tensor([[1.0, -3.0], [2.0, 3.0], [3.0, 0.5]], dtype=torch.float64)

    assert coded(TopK(fraction=0.5), values).tolist() == [[0.0, -3.0], [0.0, 3.0], [3.0, 0.0]]
    assert coded(TopK(fraction=1 / 3), values).tolist() == [[0.0, -3.0], [0.0, 3.0], [0.0, 0.0]]
    assert coded(TopK(fraction=0.01), values).count_nonzero() == 1


def test_topk_says_places_in_the_fewest_bytes() -> None:
    few = TopK(fraction=0.01).encode(torch.arange(1000.0, dtype=torch.float64), torch.float32, draw())
    assert few["places"].dtype == torch.int16
    assert few["places"].tolist() == list(range(990, 1000))
    assert few["values"].dtype == torch.float32
    many = TopK(fraction=0.5).encode(torch.arange(1000.0, dtype=torch.float64), torch.bfloat16, draw())
    assert many["mask"].shape == (125,)
    assert many["values"].dtype == torch.bfloat16


def test_ternary_is_the_best_size_for_what_is_above_the_threshold() -> None:
    # The mean magnitude is 2, so the threshold is 1.4: 4 and -3 remain, with a mean magnitude of 3.5.
    values = torch.tensor([4.0, -3.0, 1.0, 0.0], dtype=torch.float64)
    parts = Ternary().encode(values, torch.float32, draw())

    assert parts["signs"].tolist() == [0b00_00_10_01]
    assert parts["size"].tolist() == [3.5]
    assert Ternary().decode(parts, (2, 2)).tolist() == [[3.5, -3.5], [0.0, 0.0]]
    errors = [((values - torch.tensor([a, -a, 0.0, 0.0])) ** 2).sum().item() for a in (3.4, 3.5, 3.6)]
    assert errors[1] == min(errors)


def test_ternary_of_nothing_is_nothing() -> None:
    assert coded(Ternary(), torch.zeros(5)).tolist() == [0.0] * 5


RANGE = "give a number above 0, at most 1"


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: TopK(fraction=0.0), f"fraction is 0\n  where: upload.fraction\n  fix:   {RANGE}"),
        (lambda: TopK(fraction=1.5), f"fraction is 1.5\n  where: upload.fraction\n  fix:   {RANGE}"),
        (lambda: Ternary(threshold=-1.0), "threshold is -1\n  where: upload.threshold\n  fix:   give 0 or more"),
        (lambda: Int8(min_entries=0), "min_entries is 0\n  where: upload.min_entries\n  fix:   give at least 1"),
    ],
)
def test_a_wrong_setting_is_told(make: Any, error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make()
    assert str(caught.value) == error


shapes = st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple)
numbers = st.floats(-1e6, 1e6, width=32)


@st.composite
def tensors(draw_from: st.DrawFn) -> Tensor:
    shape = draw_from(shapes)
    count = math.prod(shape)
    values = draw_from(st.lists(numbers, min_size=count, max_size=count))
    return torch.tensor(values, dtype=torch.float64).view(shape)


@pytest.mark.parametrize("codec", ALL, ids=repr)
@given(values=tensors())
def test_a_code_keeps_shape_and_comes_near(codec: Codec, values: Tensor) -> None:
    found = coded(codec, values)

    assert found.shape == values.shape
    assert found.dtype == torch.float64
    error, size = (found - values).norm().item(), values.norm().item()
    if isinstance(codec, Int8):
        step = values.abs().max().item() / 127
        assert (found - values).abs().max().item() <= step * 1.001
    else:
        # Leaving entries out, or a best multiple of signs, never takes one farther away than sending nothing.
        assert error <= size * (1 + 1e-6)


@pytest.mark.parametrize("num_bits", [1, 2, 4])
@given(values=st.lists(st.integers(0, 15), max_size=40))
def test_packed_numbers_come_back(num_bits: int, values: list[int]) -> None:
    given_numbers = torch.tensor([value % 2**num_bits for value in values], dtype=torch.int64)
    packed = pack(given_numbers, num_bits)

    assert len(packed) == math.ceil(len(values) * num_bits / 8)
    assert unpack(packed, num_bits, len(values)).tolist() == given_numbers.tolist()


@given(st.sets(st.integers(0, 299), max_size=300))
def test_places_come_back(chosen: set[int]) -> None:
    places = torch.tensor(sorted(chosen), dtype=torch.int64)
    assert unpack_places(pack_places(places, 300), 300).tolist() == sorted(chosen)


U8, I16 = torch.uint8, torch.int16
VALUES = torch.ones(2)


@pytest.mark.parametrize(
    ("codec", "parts", "reason"),
    [
        (Int8(), {}, "it has no steps"),
        (Int8(), {"steps": torch.zeros(2, 2, dtype=torch.int8)}, "it has no scales"),
        (Int8(), {"steps": torch.zeros(2, 2)}, "the dtype of its steps is torch.float32"),
        (Int8(), {"steps": torch.zeros(4, dtype=torch.int8)}, "the shape of its steps is (4,)"),
        (Int8(), {"other": torch.zeros(1)}, "it has a part 'other'"),
        (
            Ternary(),
            {"signs": torch.zeros(2, dtype=U8), "size": torch.ones(1)},
            "2 bytes do not hold 4 numbers of 2 bits",
        ),
        (Ternary(), {"signs": torch.tensor([3], dtype=U8), "size": torch.ones(1)}, "a sign is neither up nor down"),
        (TopK(), {"values": VALUES}, "it has no places"),
        (TopK(), {"values": VALUES, "places": torch.tensor([1], dtype=U8)}, "2 values have 1 places"),
        (TopK(), {"values": VALUES, "places": torch.tensor([1, 4], dtype=U8)}, "its places do not ascend from 0 to 3"),
        (TopK(), {"values": VALUES, "places": torch.tensor([2, 2], dtype=U8)}, "its places do not ascend from 0 to 3"),
        (
            TopK(),
            {"values": VALUES, "places": torch.tensor([-1, 2], dtype=I16)},
            "its places do not ascend from 0 to 3",
        ),
        (
            TopK(),
            {"values": VALUES, "mask": torch.tensor([0b10001], dtype=U8)},
            "its last byte is not filled up with zeros",
        ),
        (
            TopK(),
            {"values": VALUES, "mask": torch.zeros(1, dtype=U8), "places": torch.zeros(2, dtype=U8)},
            "it has both places and a mask",
        ),
    ],
)
def test_a_broken_code_is_one_clear_error(codec: Codec, parts: dict[str, Tensor], reason: str) -> None:
    with pytest.raises(PayloadError) as caught:
        codec.decode(parts, (2, 2))
    assert str(caught.value) == f"its code is broken: {reason}\n  fix:   send what the codec makes"


dtypes = st.sampled_from([torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.bool])


@st.composite
def anything(draw_from: st.DrawFn) -> dict[str, Tensor]:
    names = draw_from(
        st.lists(st.sampled_from(["steps", "scales", "signs", "size", "values", "places", "mask", "x"]), unique=True)
    )
    found = {}
    for name in names:
        shape = draw_from(st.lists(st.integers(0, 4), max_size=3))
        value = draw_from(st.integers(-3, 200))
        found[name] = torch.full(shape, value, dtype=torch.int64).to(draw_from(dtypes))
    return found


@pytest.mark.parametrize("codec", ALL, ids=repr)
@given(parts=anything(), shape=shapes)
def test_whatever_comes_ends_in_a_tensor_of_that_shape_or_in_a_payload_error(
    codec: Codec, parts: dict[str, Tensor], shape: tuple[int, ...]
) -> None:
    reason = ""
    try:
        found = codec.decode(parts, shape)
    except PayloadError as error:
        reason = error.what
    assert reason.startswith("its code is broken: ") or (found.shape == shape and found.dtype == torch.float64)
