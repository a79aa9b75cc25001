"""Uploads as integers that add up, and their total as an upload: closed forms, bounds and refusals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedfuse.core.errors import ConfigError, PayloadError
from fedfuse.core.expecting import TensorSpec
from fedfuse.core.fixed_point import FixedPoint, SumSettings
from fedfuse.core.payload import Payload
from fedfuse.core.settings import from_json
from fedfuse.core.sums import Codes, SumLayout

TABLE = {"model/*": "num_examples", "num_examples": "", "counts": "", "rows": "counts", "loss": ""}


def layout(expect: Mapping[str, Any], table: Mapping[str, str] = TABLE) -> SumLayout:
    return SumLayout.of(expect, table, "toy, exchange round_0")


def total_of(uploads: list[Payload], expect: Mapping[str, Any], terms: SumSettings | None = None) -> Payload:
    found, point = layout(expect), FixedPoint(terms or SumSettings(), len(uploads))
    total: Codes = np.zeros(found.size, dtype=np.uint64)
    for upload in uploads:
        total += found.encode(upload, point)
    return found.decode(total, point)


def test_a_mean_a_sum_and_a_mean_by_rows() -> None:
    uploads = [
        Payload(
            {
                "num_examples": 1,
                "model/w": torch.tensor([1.0, -4.0]),
                "counts": torch.tensor([1, 0, 0]),
                "rows": torch.tensor([[2.0, 3.0], [9.0, 9.0], [0.0, 0.0]]),
                "loss": 0.25,
            }
        ),
        Payload(
            {
                "num_examples": 3,
                "model/w": torch.tensor([3.0, 0.0]),
                "counts": torch.tensor([1, 2, 0]),
                "rows": torch.tensor([[4.0, 5.0], [1.0, -1.0], [7.0, 7.0]]),
                "loss": -1.5,
            }
        ),
    ]
    expect = {
        "num_examples": int,
        "model/w": TensorSpec((2,)),
        "counts": TensorSpec((3,), torch.int64),
        "rows": TensorSpec((3, 2)),
        "loss": float,
    }
    total = total_of(uploads, expect)
    assert total["num_examples"] == 4
    assert total.tensor("model/w").tolist() == [2.5, -1.0]
    assert total.tensor("counts").tolist() == [2, 2, 0]
    # The last row has no weight at all, the second only that of the second client.
    assert total.tensor("rows").tolist() == [[3.0, 4.0], [1.0, -1.0], [0.0, 0.0]]
    assert total["loss"] == -1.25


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_every_kind_of_number_comes_back_as_it_was(dtype: torch.dtype) -> None:
    value = torch.tensor([[0.5, -1.25], [0.0, 3.0]]).to(dtype)
    uploads = [Payload({"num_examples": count, "model/w": value}) for count in (1, 2, 4)]
    found = total_of(uploads, {"num_examples": int, "model/w": value}).tensor("model/w")
    assert found.dtype == dtype
    assert torch.equal(found, value)


def test_whole_numbers_are_averaged_and_rounded_and_a_scalar_tensor_stays_one() -> None:
    uploads = [Payload({"num_examples": count, "model/n": torch.tensor(n)}) for count, n in ((1, 10), (2, 12))]
    found = total_of(uploads, {"num_examples": int, "model/n": torch.tensor(0)}).tensor("model/n")
    assert found.shape == ()
    assert found.dtype == torch.int64
    assert found.item() == 11


def test_plain_whole_numbers_add_up_without_any_error() -> None:
    large = 2**60 - 1
    uploads = [Payload({"counts": torch.tensor([large, -large])}), Payload({"counts": torch.tensor([large, 5])})]
    found = total_of(uploads, {"counts": TensorSpec((2,), torch.int64)}).tensor("counts")
    assert found.tolist() == [2 * large, 5 - large]


def test_what_the_layout_does_not_name_is_left_out() -> None:
    expect = {"num_examples": int}
    point = FixedPoint(SumSettings(), 2)
    codes = layout(expect).encode(Payload({"num_examples": 7, "curve/loss": torch.ones(3)}), point)
    assert codes.tolist() == [7]


@settings(max_examples=60, deadline=None)
@given(
    values=st.lists(
        st.tuples(st.integers(1, 2**20), st.lists(st.floats(-16384, 16384, width=32), min_size=3, max_size=3)),
        min_size=2,
        max_size=7,
    )
)
def test_the_mean_is_within_the_bound_that_is_said(values: list[tuple[int, list[float]]]) -> None:
    uploads = [Payload({"num_examples": n, "model/w": torch.tensor(x, dtype=torch.float64)}) for n, x in values]
    expect = {"num_examples": int, "model/w": TensorSpec((3,), torch.float64)}
    found = total_of(uploads, expect)
    weight = sum(n for n, _ in values)
    true = [math.fsum(n * x[i] for n, x in values) / weight for i in range(3)]
    point = FixedPoint(SumSettings(), len(values))
    bound = point.error_of_mean(weight)
    assert bound <= 1e-6 * SumSettings().clipping_range
    assert found["num_examples"] == weight
    for have, want in zip(found.tensor("model/w").tolist(), true, strict=True):
        assert abs(have - want) <= bound


@settings(max_examples=60, deadline=None)
@given(
    num_clients=st.integers(2, 2**12),
    max_weight=st.integers(1, 2**30),
    clipping_range=st.floats(1e-6, 1e9),
)
def test_the_bound_is_a_millionth_of_the_range_whatever_the_settings(
    num_clients: int, max_weight: int, clipping_range: float
) -> None:
    terms = SumSettings(max_weight=max_weight, clipping_range=clipping_range)
    point = FixedPoint(terms, num_clients)
    assert point.error_of_mean(num_clients) <= 1e-6 * clipping_range
    # The largest numbers of all clients together stay below what a total may be.
    largest = math.ldexp(clipping_range * max_weight, point.num_bits) * num_clients
    assert largest <= 2.0**62


@settings(max_examples=40, deadline=None)
@given(value=st.floats(allow_nan=False, allow_infinity=False, width=32), fits=st.booleans())
def test_a_number_beyond_the_range_is_refused_and_never_clipped(value: float, fits: bool) -> None:
    terms = SumSettings(clipping_range=max(abs(value), 1e-3) * (1.0 if fits else 0.5))
    upload = Payload({"num_examples": 1, "model/w": torch.tensor([value], dtype=torch.float64)})
    found, point = layout({"num_examples": int, "model/w": TensorSpec((1,), torch.float64)}), FixedPoint(terms, 2)
    if abs(value) <= terms.clipping_range:
        assert abs(found.decode(found.encode(upload, point), point).tensor("model/w").item() - value) <= (
            point.error_of_mean(1)
        )
    else:
        with pytest.raises(PayloadError, match="holds a number beyond the range of the sum"):
            found.encode(upload, point)


def test_the_refusals_say_what_to_ask_for() -> None:
    found = layout({"num_examples": int, "model/w": TensorSpec((1,))})
    point = FixedPoint(SumSettings(max_weight=1000), 2)

    def refusal(upload: dict[str, Any]) -> str:
        with pytest.raises(PayloadError) as caught:
            found.encode(Payload(upload), point)
        return str(caught.value)

    assert refusal({"num_examples": 5, "model/w": torch.tensor([20000.0])}) == (
        '"model/w" holds a number beyond the range of the sum, which ends at 16,384\n'
        "  fix:   ask for a larger federation.secure_aggregation.clipping_range"
    )
    assert refusal({"num_examples": 1001, "model/w": torch.ones(1)}) == (
        '"num_examples" is not from 1 to 1,000, as a weight must be\n'
        "  fix:   ask for a larger federation.secure_aggregation.max_weight"
    )
    assert refusal({"num_examples": 5}) == '"model/w" is not of shape (1,) and dtype float32'
    assert refusal({"num_examples": 5.0, "model/w": torch.ones(1)}) == '"num_examples" is a float, wanted a int'
    assert refusal({"num_examples": 5, "model/w": torch.ones(1).double()}) == (
        '"model/w" is not of shape (1,) and dtype float32'
    )
    for hole in (math.nan, math.inf):
        reason = refusal({"num_examples": 5, "model/w": torch.tensor([hole])})
        assert reason.startswith('"model/w" holds a number beyond the range of the sum')


def test_a_total_with_masks_left_in_it_is_no_total() -> None:
    found, point = layout({"model/w": TensorSpec((64,)), "num_examples": int}), FixedPoint(SumSettings(), 2)
    noise = np.random.Generator(np.random.PCG64(0)).integers(0, 2**64, size=65, dtype=np.uint64)
    with pytest.raises(PayloadError, match="the masked uploads do not add up"):
        found.decode(noise, point)
    with pytest.raises(PayloadError, match="the masked uploads do not add up"):
        found.decode(np.zeros(3, dtype=np.uint64), point)


@pytest.mark.parametrize(
    ("expect", "key"),
    [
        ({"curve/loss": TensorSpec((3,))}, "curve/loss"),
        ({"loss": str}, "loss"),
        ({"loss": torch.zeros(2, dtype=torch.bool)}, "loss"),
        ({"loss": TensorSpec((None,))}, "loss"),
    ],
)
def test_what_cannot_be_added_up_is_refused_before_anybody_is_asked(expect: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        layout(expect)
    assert str(caught.value) == (
        f'"{key}" cannot be added up over clients without being seen\n'
        "  where: toy, exchange round_0\n"
        "  fix:   use other settings of the method, or leave federation.secure_aggregation out"
    )


@pytest.mark.parametrize("weight", [TensorSpec((2,), torch.int64), TensorSpec((3,)), None])
def test_a_weight_must_be_a_whole_number_for_each_row(weight: Any) -> None:
    expect = {"rows": TensorSpec((3, 2)), **({} if weight is None else {"counts": weight})}
    with pytest.raises(ConfigError, match='"rows" cannot be averaged by "counts"'):
        layout(expect)


def test_a_layout_travels_as_lists() -> None:
    found = layout({"num_examples": int, "model/w": TensorSpec((2, 3)), "loss": float})
    assert SumLayout.from_json(found.to_json()) == found
    for rows in (None, 3, [["a"]], [[1, 2, 3, 4]], [["a", "int", ["x"], ""]]):
        with pytest.raises(PayloadError, match="this is no layout of a sum"):
            SumLayout.from_json(rows)
    with pytest.raises(PayloadError, match='"no_such" is no dtype'):
        _ = SumLayout.from_json([["a", "no_such", [], ""]]).parts[0].dtype


def test_the_layout_of_a_state_dict_takes_tensors_as_they_are() -> None:
    state: dict[str, Tensor] = {f"model/{k}": v for k, v in torch.nn.BatchNorm1d(3).state_dict().items()}
    found = layout({**state, "num_examples": int})
    assert found.size == 3 * 4 + 1 + 1


def test_settings_are_checked() -> None:
    wrong = [
        ({"num_shares": 4}, "num_shares is 4", "give an odd number of at least 3"),
        ({"num_shares": 1}, "num_shares is 1", "give an odd number of at least 3"),
        ({"reconstruction_threshold": 0.5}, "reconstruction_threshold is 0.5", "give a number above 0.5, at most 1"),
        ({"clipping_range": 0.0}, "clipping_range is 0.0", "give a number above 0"),
        ({"max_weight": 0}, "max_weight is 0", "give at least 1"),
        ({"stage_timeout_s": 0.0}, "stage_timeout_s is 0.0", "give a number above 0"),
    ]
    for values, what, fix in wrong:
        with pytest.raises(ConfigError) as caught:
            from_json(SumSettings, values, where="federation.secure_aggregation")
        name = next(iter(values))
        assert str(caught.value) == f"{what}\n  where: federation.secure_aggregation.{name}\n  fix:   {fix}"
    with pytest.raises(ConfigError) as caught:
        FixedPoint(SumSettings(max_weight=2**40), 1024)
    assert str(caught.value) == (
        "the sum of 1,024 clients with weights up to 1,099,511,627,776 has too few bits to be right\n"
        "  where: federation.secure_aggregation.max_weight\n"
        "  fix:   give a smaller max_weight"
    )
