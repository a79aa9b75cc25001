"""Coded uploads: what is coded, what is kept for the next time, and how the server reads them."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedfuse.core.codecs import Codec, Int8, Ternary, TopK
from fedfuse.core.coding import Coding, check_codec, codec_of, codec_terms, plain_key
from fedfuse.core.describing import refused_key, upload_rows
from fedfuse.core.errors import ConfigError, PayloadError, TaskError, UploadRefused
from fedfuse.core.expecting import Expectation, TensorSpec, check_upload
from fedfuse.core.known import Known
from fedfuse.core.payload import Payload
from fedfuse.core.seeding import Rng

START = {"w": torch.arange(128.0).view(2, 64), "bn.running_mean": torch.zeros(64), "small": torch.zeros(3)}
STEP = torch.zeros(2, 64)
STEP[0, 5], STEP[1, 7], STEP[1, 9] = 4.0, -3.0, 2.0


def coding(codec: Codec, message: Payload | None = None) -> Coding:
    return Coding(codec, Known(message or Payload(), lambda: START))


def encoded(codec: Codec, upload: Payload, unsent: Payload | None = None) -> tuple[Payload, Payload]:
    return coding(codec).encode(upload, unsent or Payload(), Rng(0))


def trained() -> Payload:
    return Payload(
        {
            "model/w": START["w"] + STEP,
            "model/bn.running_mean": torch.ones(64),
            "model/small": torch.ones(3),
            "other/w": torch.linspace(-1, 1, 100),
            "counts": torch.arange(100),
            "curve/train_loss": torch.linspace(1, 0, 100),
            "num_examples": 7,
        }
    )


def test_only_large_tensors_whose_start_is_known_are_coded_by_topk() -> None:
    sent, left = encoded(TopK(fraction=2 / 128), trained())

    assert sorted(set(sent) - set(trained())) == ["coded/places/model/w", "coded/values/model/w"]
    assert sorted(set(trained()) - set(sent)) == ["model/w"]
    assert sent.tensor("coded/places/model/w").tolist() == [5, 64 + 7]
    assert sent.tensor("coded/values/model/w").tolist() == [4.0, -3.0]
    assert left.tensor("model/w").nonzero().tolist() == [[1, 9]]


def test_what_is_named_is_coded_but_no_statistics_and_curves() -> None:
    sent, left = encoded(Int8(keys=("*",)), trained())

    codes = {plain_key(key) for key in sent if key.startswith("coded/") and key != "coded/layout"}
    assert codes == {"model/w", "other/w"}
    assert json.loads(sent.text("coded/layout")) == {"other/w": ["float32", [100]]}
    assert len(left) == 0
    opened = coding(Int8()).open(sent)
    assert list(opened) == list(trained())
    assert torch.allclose(opened["model/w"], START["w"] + STEP, atol=4 / 254)  # type: ignore[arg-type]
    assert opened["num_examples"] == 7


def test_keys_say_what_is_coded_also_where_no_start_is_known() -> None:
    sent, _ = encoded(TopK(keys=("other/*",), fraction=0.01), trained())

    assert sorted(key for key in sent if key.startswith("coded/")) == [
        "coded/layout",
        "coded/places/other/w",
        "coded/values/other/w",
    ]
    assert coding(TopK()).open(sent)["other/w"].nonzero().tolist() == [[0]]  # type: ignore[union-attr]


def test_what_was_sent_goes_before_the_first_weights() -> None:
    message = Payload({"model/w": START["w"] + 1})
    sent, _ = coding(Ternary(), message).encode(Payload({"model/w": START["w"] + 3}), Payload(), Rng(0))

    assert sent.tensor("coded/size/model/w").item() == 2.0
    assert torch.equal(coding(Ternary(), message).open(sent)["model/w"], START["w"] + 3)  # type: ignore[arg-type]
    # Without the message the same bytes are a change of something else.
    assert torch.equal(coding(Ternary()).open(sent)["model/w"], START["w"] + 2)  # type: ignore[arg-type]


def test_what_was_left_out_is_sent_the_next_time() -> None:
    codec, unsent = TopK(fraction=1 / 128), Payload()
    total = torch.zeros(2, 64)
    for _ in range(3):
        # The client does no more: all that it sends from the second time on is what it owes.
        upload = Payload({"model/w": START["w"] + (STEP if not len(unsent) else 0)})
        sent, unsent = encoded(codec, upload, unsent)
        total += coding(codec).open(sent)["model/w"] - START["w"]  # type: ignore[operator]

    assert torch.equal(total, STEP)
    assert not unsent.tensor("model/w").any()


@pytest.mark.parametrize("codec", [TopK(fraction=0.05), Ternary(error_feedback=True)], ids=repr)
@given(seed=st.integers(0, 1000))
def test_what_is_sent_and_what_is_left_make_what_was_wanted(codec: Codec, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    value, owed = START["w"] + torch.randn(2, 64, generator=draw), torch.randn(2, 64, generator=draw)
    sent, left = encoded(codec, Payload({"model/w": value}), Payload({"model/w": owed}))

    found = coding(codec).open(sent)["model/w"]
    assert isinstance(found, Tensor)
    assert torch.allclose(found + left.tensor("model/w"), value + owed, atol=1e-4)


def test_what_is_no_change_of_anything_owes_nothing_to_what_came_before() -> None:
    upload, owed = Payload({"other/w": torch.linspace(-1, 1, 100)}), Payload({"other/w": torch.ones(100)})
    sent, left = encoded(TopK(keys=("other/*",)), upload, owed)

    assert len(left) == 0
    assert sent.digest() == encoded(TopK(keys=("other/*",)), upload)[0].digest()


def test_without_error_feedback_nothing_is_kept() -> None:
    assert len(encoded(TopK(error_feedback=False), trained())[1]) == 0
    assert len(encoded(Ternary(), trained())[1]) == 0


def test_what_would_not_get_smaller_and_what_is_not_finite_travels_as_it_is() -> None:
    assert encoded(TopK(fraction=1.0), trained())[0].digest() == trained().digest()
    hole = Payload({"model/w": torch.full((2, 64), torch.nan)})
    assert list(encoded(Int8(), hole)[0]) == ["model/w"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_dtype_comes_back(dtype: torch.dtype) -> None:
    upload = Payload({"other/w": torch.linspace(-1, 1, 100).to(dtype)})
    sent = encoded(Int8(keys=("other/*",)), upload)[0]
    assert "other/w" not in sent
    found = coding(Int8()).open(sent)["other/w"]

    assert isinstance(found, Tensor)
    assert found.dtype == dtype


def test_an_upload_that_uses_the_names_of_codes_breaks_the_contract() -> None:
    with pytest.raises(TaskError, match='the upload holds "coded/x", a name of codes'):
        encoded(Int8(), Payload({"coded/x": 1}))


DECLARED = {"model/*": "weights", "other/*": "", "num_examples": "how many"}
EXPECT: Expectation = {"model/w": TensorSpec((2, 64)), "num_examples": int}


def refusal(
    sent: Payload, expect: Expectation | None = EXPECT, codec: Codec | None = None, limit: int = 1 << 30
) -> str:
    try:
        check_upload("a", sent.encode(), DECLARED, expect, limit, coding(codec or TopK()))
    except UploadRefused as error:
        return error.what.removeprefix("the upload was refused: ") + f" [{error.where}]"
    return ""


def good(codec: Codec | None = None) -> Payload:
    upload = Payload({"model/w": START["w"] + STEP, "num_examples": 3})
    return encoded(codec or TopK(), upload)[0]


@pytest.mark.parametrize("codec", [TopK(), Int8(), Ternary()], ids=repr)
def test_a_coded_upload_is_checked_as_the_upload_that_it_says(codec: Codec) -> None:
    assert refusal(good(codec), codec=codec) == ""
    # Whoever does not code is understood as well.
    assert refusal(Payload({"model/w": START["w"], "num_examples": 3}), codec=codec) == ""


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"coded/values/secret": torch.ones(1)}, "the key was not declared [client a, key 'secret']"),
        ({"coded/values": torch.ones(1)}, "the key was not declared [client a, key 'coded/values']"),
        ({"model/w": torch.zeros(2, 64)}, '"model/w" comes both as it is and coded [client a]'),
        ({"coded/values/model/x": torch.ones(1)}, '"model/x" is a change of nothing that is known [client a]'),
        ({"coded/layout": "{}}"}, "its layout is broken [client a]"),
        ({"coded/layout": '{"model/w": ["int64", [2]]}'}, "its layout is broken [client a]"),
        ({"coded/layout": '{"model/w": ["float32", [-2]]}'}, "its layout is broken [client a]"),
        ({"coded/layout": 3}, "its layout is broken [client a]"),
        ({"coded/layout": '{"model/z": ["float32", [2]]}'}, 'the layout names "model/z", which has no code [client a]'),
        (
            {"coded/layout": '{"model/w": ["float32", [128]]}'},
            "its shape is (128,), wanted (2, 64) [client a, key 'model/w']",
        ),
        (
            {"coded/layout": '{"model/w": ["float32", [1000, 1000, 1000]]}'},
            "its codes stand for 4,000,000,000 bytes, more than the limit of 34,604,032 [client a]",
        ),
        (
            {"coded/values/model/w": torch.full((13,), torch.inf)},
            "it holds NaN or infinite values [client a, key 'model/w']",
        ),
        (
            {"coded/values/model/w": torch.ones(3)},
            "its code is broken: 3 values have 13 places [client a, key 'model/w']",
        ),
        ({"num_examples": 1.5}, "it is a float, wanted a int [client a, key 'num_examples']"),
    ],
)
def test_a_hostile_code_is_refused_with_a_reason(changes: dict[str, Any], reason: str) -> None:
    assert refusal(Payload({**good(), **changes})) == reason


def test_a_code_of_nothing_expected_is_bounded_by_the_operators_limit() -> None:
    bomb = Payload({**good(), "coded/layout": '{"model/w": ["float32", [1000, 1000, 1000]]}'})
    assert refusal(bomb, None, limit=1 << 20).startswith("its codes stand for 4,000,000,000 bytes, more than the limit")


words = st.sampled_from(["coded", "values", "places", "mask", "layout", "model", "other", "w", "small", "num_examples"])
keys = st.lists(words, min_size=1, max_size=4).map("/".join)
entries = st.one_of(
    st.integers(-5, 5),
    st.text(max_size=20),
    st.just('{"other/w": ["float32", [3]]}'),
    st.builds(
        lambda shape, value, kind: torch.full(shape, value).to(kind),
        st.lists(st.integers(0, 4), max_size=3),
        st.integers(-2, 130),
        st.sampled_from([torch.uint8, torch.int16, torch.float32, torch.float64, torch.int64]),
    ),
)


@given(st.dictionaries(keys, entries, max_size=6))
def test_whatever_comes_is_taken_or_refused(table: dict[str, Any]) -> None:
    sent = Payload(table)
    reason = ""
    try:
        check_upload("a", sent.encode(), {"*": ""}, None, 1 << 20, coding(TopK()))
    except UploadRefused as error:
        reason = error.what
    assert reason.startswith("the upload was refused: ") or all(
        bool(value.isfinite().all())
        for value in coding(TopK()).open(sent).values()
        if isinstance(value, Tensor) and value.is_floating_point()
    )


def test_a_part_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(PayloadError, match='the values of "model/w" is no tensor'):
        coding(TopK()).open(Payload({"coded/values/model/w": 3}))["model/w"]


def test_the_owner_sees_what_codes_are_and_keeps_back_what_they_say() -> None:
    rows = {row.key: row.what for row in upload_rows(good().encode(), DECLARED)}

    assert rows["coded/values/model/w"] == "in a code: weights"
    assert rows["num_examples"] == "how many"
    assert refused_key(good().encode(), ["model/*"]) == "model/w"
    assert refused_key(good().encode(), ["other/*"]) is None


def test_the_section_is_read_with_its_defaults() -> None:
    assert codec_terms(None) == {} == codec_terms({"codec": "none"})
    assert codec_terms({"codec": "topk", "fraction": 0.01}) == {
        "codec": "topk",
        "keys": [],
        "min_entries": 64,
        "fraction": 0.01,
        "error_feedback": True,
    }
    assert codec_of(codec_terms({"codec": "ternary", "keys": ["model/*"]})) == Ternary(keys=("model/*",))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"codec": "zip"}, 'there is no codec "zip"\n  fix:   known: int8, ternary, topk'),
        ({"codec": 8}, "this is no codec: 8\n  where: upload.codec\n  fix:   known: none, int8, ternary, topk"),
        (
            {"fraction": 0.1},
            (
                'the setting "fraction" has no codec\n  where: upload\n'
                "  fix:   name one in upload.codec: int8, ternary, topk"
            ),
        ),
        (
            {"codec": "topk", "fractoin": 0.1},
            (
                'unknown setting "fractoin"\n  where: upload.fractoin\n'
                '  fix:   did you mean "fraction"? known: error_feedback, fraction, keys, min_entries'
            ),
        ),
    ],
)
def test_a_wrong_section_is_told(settings: dict[str, Any], error: str) -> None:
    with pytest.raises(Exception) as caught:  # noqa: PT011 - ConfigError and RegistryError, told by their words
        codec_terms(settings)
    assert str(caught.value) == error


def test_the_noise_of_a_mean_and_a_codec_exclude_each_other() -> None:
    with pytest.raises(ConfigError) as caught:
        check_codec(codec_terms({"codec": "int8"}), "central")
    assert str(caught.value) == (
        "the noise of the mean is made for uploads as they were clipped, and a codec changes them after that\n"
        "  where: upload.codec\n"
        "  fix:   use privacy.mechanism: local, whose noise is there before the codec, or leave the codec out"
    )
    for mechanism in (None, "local", "trained"):
        check_codec(codec_terms({"codec": "int8"}), mechanism)
