"""Payload: what goes in comes out, the bytes are the same every time, and no bytes at all can do harm."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from fedfuse.core.errors import PayloadError
from fedfuse.core.payload import Payload, PayloadFile, check_key, matches, read_header

DTYPES = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
]

EXAMPLE = Payload(
    {"model/w": torch.arange(6.0).reshape(2, 3), "model/steps": torch.tensor(7), "text": "hé", "n": 3, "on": True}
)


def same(a: object, b: object) -> bool:
    """Equal in type and bits; NaN equals NaN."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return a.contiguous().reshape(-1).view(torch.uint8).equal(b.contiguous().reshape(-1).view(torch.uint8))
    if isinstance(a, float) and isinstance(b, float) and math.isnan(a):
        return math.isnan(b)
    return type(a) is type(b) and a == b


def again(payload: Payload) -> Payload:
    return Payload.decode(payload.encode())


def with_scalars(text: str) -> bytes:
    return save({}, {"fedfuse.scalars": text})


def with_header(header: object, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


# --- round trips


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (2, 3), (2, 1, 3)], ids=str)
def test_every_dtype_and_shape_comes_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(math.prod(shape)).reshape(shape).to(dtype)
    assert same(again(Payload({"a/b": tensor}))["a/b"], tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(12.0).reshape(3, 4).T,
        torch.arange(12.0)[::3],
        torch.tensor([5.0]).expand(4),
        torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
        torch.complex(torch.ones(3), torch.arange(3.0)).conj().imag,
    ],
    ids=["transposed", "strided", "expanded", "channels_last", "negated_view"],
)
def test_tensors_that_are_not_contiguous_come_back_contiguous(tensor: torch.Tensor) -> None:
    found = again(Payload({"x": tensor})).tensor("x")
    assert found.equal(tensor)
    assert found.is_contiguous()


def test_tensors_that_share_memory_come_back_apart() -> None:
    tied = torch.ones(2)
    found = again(Payload({"a": tied, "b": tied}))
    found.tensor("a").zero_()
    assert found.tensor("b").tolist() == [1, 1]


def test_a_decoded_tensor_owns_its_memory() -> None:
    data = Payload({"x": torch.ones(2)}).encode()
    Payload.decode(data).tensor("x").zero_()
    assert Payload.decode(data).tensor("x").tolist() == [1, 1]


def test_nothing_of_the_autograd_graph_travels() -> None:
    payload = Payload({"x": torch.ones(2, requires_grad=True) * 2})
    assert not payload.tensor("x").requires_grad
    assert not again(payload).tensor("x").requires_grad


@pytest.mark.parametrize(
    "value",
    [True, False, 0, -7, 2**62, 0.1, -0.0, 1e308, 5e-324, math.inf, -math.inf, math.nan, "", "ü\n\x00", "inf", "nan"],
    ids=repr,
)
def test_every_scalar_comes_back_with_its_type(value: bool | int | float | str) -> None:
    found = again(Payload({"s": value}))["s"]
    assert same(found, value)
    if isinstance(value, float) and not math.isnan(value):
        assert math.copysign(1, float(found)) == math.copysign(1, value)


@given(
    st.dictionaries(
        st.from_regex(r"[a-z.0-9_]{1,4}(/[a-z]{1,3}){0,2}", fullmatch=True),
        st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), st.floats(), st.text(max_size=8)),
        max_size=5,
    )
)
def test_any_scalars_come_back(values: dict[str, bool | int | float | str]) -> None:
    found = again(Payload(values))
    assert list(found) == sorted(values)
    assert all(same(found[key], values[key]) for key in values)


def test_an_empty_payload_comes_back() -> None:
    assert len(again(Payload())) == 0


# --- bytes


def test_the_order_of_insertion_does_not_show_in_the_bytes() -> None:
    a = Payload({"b/x": torch.ones(2), "a": 1, "b/y": torch.zeros(3, dtype=torch.bfloat16), "c": "t"})
    b = Payload({"c": "t", "b/y": torch.zeros(3, dtype=torch.bfloat16), "a": 1, "b/x": torch.ones(2)})
    assert list(a) == list(b) == ["a", "b/x", "b/y", "c"]
    assert a.encode() == b.encode()
    assert a.digest() == b.digest() == hashlib.sha256(a.encode()).hexdigest()


def test_encoding_is_the_same_every_time_and_after_a_round_trip() -> None:
    data = EXAMPLE.encode()
    assert data == EXAMPLE.encode() == again(EXAMPLE).encode()


def test_a_single_bit_changes_the_digest() -> None:
    assert Payload({"x": torch.tensor([0.0])}).digest() != Payload({"x": torch.tensor([-0.0])}).digest()


def test_bytes_are_counted_before_encoding() -> None:
    payload = Payload({"a": torch.zeros(3, dtype=torch.bfloat16), "b": torch.zeros(2), "n": 1})
    assert payload.num_bytes == 3 * 2 + 2 * 4
    assert repr(payload) == "Payload(3 keys, 14 bytes)"


# --- keys and values that are refused

KEY_FIX = '\n  fix:   use "group/name": printable, at most 512 characters, no * ? [ ] and no empty part'


@pytest.mark.parametrize(
    "key", ["", "/", "a/", "/a", "a//b", "a*", "a?", "a[", "a]", "a\nb", "a\n", "\x00", "a\x7f", "k" * 513]
)
def test_a_key_that_cannot_be_is_refused(key: str) -> None:
    with pytest.raises(PayloadError) as caught:
        Payload({key: 1})
    assert str(caught.value) == f"{key!r:.80} is no key of a payload" + KEY_FIX


def test_a_key_that_is_no_string_is_refused() -> None:
    with pytest.raises(PayloadError) as caught:
        Payload({3: 1})  # type: ignore[dict-item]
    assert str(caught.value) == "3 is no key of a payload" + KEY_FIX


@pytest.mark.parametrize("key", ["a", "a/b", "a/b/c", "layer1.0.weight", "ü", "a b", "k" * 512, ".."])
def test_keys_that_can_be(key: str) -> None:
    check_key(key)
    assert list(again(Payload({key: torch.ones(1)}))) == [key]


@pytest.mark.parametrize("key", ["__metadata__", "\ud800"])
def test_a_key_that_the_format_cannot_hold_is_refused_when_it_is_put(key: str) -> None:
    # The first is the format's own entry of the header, the second has no UTF-8.
    with pytest.raises(PayloadError) as caught:
        Payload({key: torch.ones(1)})
    assert str(caught.value) == f"{key!r} is no key of a payload" + KEY_FIX


@pytest.mark.parametrize(
    ("value", "kind"), [(None, "NoneType"), ([1], "list"), ({}, "dict"), (b"x", "bytes"), (1j, "complex")]
)
def test_a_value_of_another_type_is_refused(value: object, kind: str) -> None:
    with pytest.raises(PayloadError) as caught:
        Payload({"a": value})  # type: ignore[dict-item]
    assert str(caught.value) == f'"a" is a {kind}\n  fix:   a payload holds tensors, bool, int, float and str only'


@pytest.mark.parametrize(
    ("tensor", "layout", "dtype"),
    [
        (torch.ones(2).to_sparse(), "torch.sparse_coo", "torch.float32"),
        (torch.ones(2, dtype=torch.complex64), "torch.strided", "torch.complex64"),
    ],
)
def test_a_tensor_that_is_not_dense_and_real_is_refused(tensor: torch.Tensor, layout: str, dtype: str) -> None:
    with pytest.raises(PayloadError) as caught:
        Payload({"a": tensor})
    assert str(caught.value) == (
        f'"a" is a tensor of layout {layout} and dtype {dtype}\n  fix:   send dense real tensors'
    )


def test_an_integer_beyond_64_bits_is_refused() -> None:
    # It would pass every check of type and then overflow on the server, where it is turned into a float.
    with pytest.raises(PayloadError) as caught:
        Payload({"n": 2**63})
    assert str(caught.value) == '"n" is an integer beyond 64 bits\n  fix:   send it as a float or a string'


def test_a_refused_value_leaves_the_payload_as_it_was() -> None:
    payload = Payload({"a": 1})
    with pytest.raises(PayloadError):
        payload["a"] = None  # type: ignore[assignment]
    assert dict(payload) == {"a": 1}


# --- looking things up


def test_typed_look_ups() -> None:
    assert EXAMPLE.number("n") == 3.0
    assert EXAMPLE.text("text") == "hé"
    assert EXAMPLE.tensor("model/steps").item() == 7


@pytest.mark.parametrize(
    ("look", "key", "what"),
    [
        ("tensor", "n", 'the payload has no tensor "n"'),
        ("tensor", "no", 'the payload has no tensor "no"'),
        ("number", "on", 'the payload has no number "on"'),
        ("number", "text", 'the payload has no number "text"'),
        ("number", "model/w", 'the payload has no number "model/w"'),
        ("text", "n", 'the payload has no string "n"'),
    ],
)
def test_a_look_up_that_fails_says_what_there_is(look: str, key: str, what: str) -> None:
    with pytest.raises(PayloadError) as caught:
        getattr(EXAMPLE, look)(key)
    assert str(caught.value) == f"{what}\n  fix:   it has: model/steps, model/w, n, on, text"
    with pytest.raises(PayloadError) as caught:
        getattr(Payload(), look)(key)
    assert caught.value.fix == "it has: nothing"


def test_groups() -> None:
    payload = Payload({"n": 1, "a/skip": "text"}).put_group("a", {"y": torch.ones(1), "x/z": torch.zeros(1)})
    payload.put_group("ab", {"x": torch.zeros(1)})
    assert list(payload.group("a")) == ["x/z", "y"]
    assert list(payload.group("a/x")) == ["z"]
    assert payload.group("b") == {}


def test_it_is_a_mutable_mapping() -> None:
    payload = Payload({"b": 1, "a": 2})
    del payload["b"]
    payload["c"] = 3
    assert dict(payload) == {"a": 2, "c": 3}
    assert "b" not in payload
    with pytest.raises(KeyError):
        payload["b"]


@pytest.mark.parametrize(
    ("key", "patterns", "wanted"),
    [
        ("a/b", ["a/*"], True),
        ("a/b/c", ["a/*"], True),
        ("a", ["a/*"], False),
        ("ab/c", ["a/*"], False),
        ("A/b", ["a/*"], False),
        ("a/b", ["a/b"], True),
        ("a/bc", ["a/b"], False),
        ("n", ["a/*", "n"], True),
        ("n", [], False),
    ],
)
def test_declared_keys(key: str, patterns: list[str], wanted: bool) -> None:
    assert matches(key, patterns) is wanted


# --- bytes that are no payload

WHOLE = "\n  fix:   send what Payload.encode() gives, whole"


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "0 bytes with a header of 0"),
        (b"\x01\x02", "2 bytes with a header of 513"),
        (b"\xff" * 8, "8 bytes with a header of 18446744073709551615"),
        (b"\x10" + b"\x00" * 7 + b"{}", "10 bytes with a header of 16"),
        (with_header(b"{"), "the header is not JSON"),
        (with_header(b"\xff\xfe\xfd"), "the header is not JSON"),
        (with_header(b"[" * 100_000), "the header is not JSON"),
        (with_header([1]), "the header is not a table"),
    ],
    ids=["empty", "short", "huge_header", "cut_header", "no_json", "no_text", "deep", "no_table"],
)
def test_a_broken_header_says_so(data: bytes, what: str, tmp_path: Path) -> None:
    with pytest.raises(PayloadError) as caught:
        Payload.decode(data)
    assert str(caught.value) == f"the bytes are not a payload: {what}" + WHOLE
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(PayloadError) as caught:
        PayloadFile(tmp_path / "x")
    where = f"\n  where: {tmp_path / 'x'}"
    assert str(caught.value) == f"the bytes are not a payload: {what}" + where + WHOLE


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "{",
        '{"a":null}',
        '{"a":[1]}',
        '{"a":{"float":"x"}}',
        '{"a":{"float":[]}}',
        '{"a":{"int":"1"}}',
        '{"a":{"float":1' + "0" * 400 + "}}",
        "[" * 100_000,
    ],
    ids=["list", "cut", "null", "inner_list", "no_float", "float_list", "other_tag", "overflow", "deep"],
)
def test_broken_scalars_say_so(text: str) -> None:
    with pytest.raises(PayloadError) as caught:
        Payload.decode(with_scalars(text))
    assert str(caught.value) == (
        "the bytes are not a payload: its scalars are broken\n  fix:   send what Payload.encode() gives"
    )


def test_a_huge_integer_in_the_bytes_is_refused() -> None:
    with pytest.raises(PayloadError):
        Payload.decode(with_scalars('{"a":1' + "0" * 400 + "}"))


def test_a_key_that_is_both_tensor_and_scalar_is_refused() -> None:
    with pytest.raises(PayloadError) as caught:
        Payload.decode(save({"a": torch.ones(1)}, {"fedfuse.scalars": '{"a":1}'}))
    assert str(caught.value) == '"a" stands twice in the payload\n  fix:   send what Payload.encode() gives'


def test_a_bad_key_in_the_bytes_is_refused() -> None:
    for data in (save({"a//b": torch.ones(1)}), with_scalars('{"a*":1}')):
        with pytest.raises(PayloadError, match="is no key of a payload"):
            Payload.decode(data)


@pytest.mark.parametrize(
    "entry",
    [
        5,
        {"dtype": "F32", "shape": [1], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]},
        {"dtype": "F32", "shape": [2**62, 4], "data_offsets": [0, 4]},
        {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]},
        {"dtype": "NO", "shape": [1], "data_offsets": [0, 4]},
        {"dtype": "F8_E8M0", "shape": [4], "data_offsets": [0, 4]},
        {"dtype": "C64", "shape": [], "data_offsets": [0, 8]},
    ],
    ids=["number", "beyond", "hole", "overflow", "negative", "unknown_dtype", "unsupported_dtype", "complex"],
)
def test_tensors_that_do_not_fit_the_bytes_are_refused(entry: object) -> None:
    with pytest.raises(PayloadError):
        Payload.decode(with_header({"w": entry}, b"\0" * 4 if "C64" not in str(entry) else b"\0" * 8))


W = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


@pytest.mark.parametrize(
    ("header", "what"),
    [
        (b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"w":{}}', "a name stands twice in the header"),
        (b'{"w":{"dtype":"F32","dtype":"I32"}}', "a name stands twice in the header"),
        (b"\xef\xbb\xbf{}", "the header is not JSON"),
        ("{}".encode("utf-16"), "the header is not JSON"),
        ({"w": {**W, "more": 1}}, "'w' is described in another way than a tensor is"),
        ({"w": [1]}, "'w' is described in another way than a tensor is"),
        ({"w": {**W, "dtype": "F4"}}, "'w' has the dtype 'F4'"),
        ({"w": {**W, "dtype": ["F32"]}}, "'w' has the dtype ['F32']"),
        ({"w": {**W, "shape": [1.0]}}, "'w' has the shape [1.0]"),
        ({"w": {**W, "shape": [True]}}, "'w' has the shape [True]"),
        ({"w": {**W, "shape": [1] * 65}}, f"'w' has the shape {[1] * 65!r:.80}"),
        ({"w": {**W, "shape": [1 << 63, 0]}}, "'w' has the shape [9223372036854775808, 0]"),
        ({"w": {**W, "shape": [0, 1 << 61]}}, "'w' has the shape [0, 2305843009213693952]"),
        ({"w": {**W, "data_offsets": [0, 4, 4]}}, "'w' has the place [0, 4, 4]"),
        ({"w": {**W, "data_offsets": [4, 0]}}, "'w' of F32 [1] is not -4 bytes"),
        ({"w": {**W, "shape": [2]}}, "'w' of F32 [2] is not 4 bytes"),
        ({"w": W, "v": W}, "its tensors overlap or leave a hole"),
        ({"w": {**W, "data_offsets": [1, 5]}}, "its tensors overlap or leave a hole"),
        ({}, "its tensors take 0 bytes, 4 are there"),
    ],
)
def test_what_a_header_claims_is_compared_with_the_bytes(header: object, what: str, tmp_path: Path) -> None:
    data = with_header(header, b"\0" * 4)
    with pytest.raises(PayloadError) as caught:
        Payload.decode(data)
    assert str(caught.value) == f"the bytes are not a payload: {what}" + WHOLE
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(PayloadError) as caught:
        PayloadFile(tmp_path / "x")
    assert caught.value.what == f"the bytes are not a payload: {what}"


def test_as_many_dimensions_as_torch_computes_with() -> None:
    data = with_header({"w": {**W, "shape": [1] * 64}}, b"\0" * 4)
    assert torch.isfinite(Payload.decode(data).tensor("w")).all()


def test_bytes_that_are_no_bool_are_refused() -> None:
    # Torch would count such a value twice.
    with pytest.raises(PayloadError) as caught:
        Payload.decode(with_header({"on": {"dtype": "BOOL", "shape": [2], "data_offsets": [0, 2]}}, b"\1\2"))
    assert str(caught.value) == '"on" holds bytes that are no bool\n  fix:   send what Payload.encode() gives'


def test_a_text_without_utf8_is_refused() -> None:
    message = '"a" is a text that has no UTF-8\n  fix:   leave out lone surrogates'
    with pytest.raises(PayloadError) as caught:
        Payload({"a": "\ud800"})
    assert str(caught.value) == message
    with pytest.raises(PayloadError) as caught:
        Payload.decode(with_scalars('{"a":"\\ud800"}'))
    assert str(caught.value) == message


def test_a_header_that_could_not_be_read_again_is_not_written() -> None:
    with pytest.raises(PayloadError) as caught:
        Payload({"a": "x" * (16 << 20)}).encode()
    assert str(caught.value) == (
        "names and scalars take 16,777,272 bytes, more than 16,777,216\n"
        "  fix:   send long texts and many numbers as tensors"
    )


def outcome(data: bytes) -> None:
    """Decoding ends in a payload that can be encoded again, or in our error; nothing else."""
    try:
        found = Payload.decode(data)
    except PayloadError:
        return
    assert same_payload(again(found), found)


def same_payload(a: Payload, b: Payload) -> bool:
    return list(a) == list(b) and all(same(a[key], b[key]) for key in a)


@given(st.binary(max_size=200))
def test_any_bytes_end_in_a_payload_or_in_our_error(data: bytes) -> None:
    outcome(data)
    outcome(len(data).to_bytes(8, "little") + data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.just("F32"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "float", "__metadata__", "a"]), inner)
    ),
    max_leaves=8,
)


@given(JSON, st.binary(max_size=16))
def test_any_table_as_header_ends_in_a_payload_or_in_our_error(header: object, body: bytes) -> None:
    outcome(with_header({"a": header}, body))
    outcome(with_header({"__metadata__": header}, body))
    outcome(with_scalars(json.dumps(header)))
    outcome(with_scalars(json.dumps({"a": header})))


@settings(max_examples=50)
@given(st.integers(0, len(EXAMPLE.encode()) - 1))
def test_cut_bytes_end_in_our_error(length: int) -> None:
    with pytest.raises(PayloadError):
        Payload.decode(EXAMPLE.encode()[:length])


def test_every_damaged_byte_ends_in_a_payload_or_in_our_error() -> None:
    data = EXAMPLE.encode()
    for position in range(len(data)):
        for flip in (0x01, 0x80, 0xFF):
            outcome(data[:position] + bytes([data[position] ^ flip]) + data[position + 1 :])


def test_more_bytes_behind_a_payload_are_refused() -> None:
    with pytest.raises(PayloadError):
        Payload.decode(EXAMPLE.encode() + b"\0")


# --- files


def test_a_file_read_lazily_holds_the_same(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    payload = Payload({**EXAMPLE, "nan": math.nan, "half": torch.ones((), dtype=torch.bfloat16)})
    path.write_bytes(payload.encode())
    for opened in (PayloadFile(path), PayloadFile(str(path))):
        assert list(opened) == list(payload)
        assert len(opened) == len(payload)
        assert all(same(opened[key], payload[key]) for key in payload)
        assert same_payload(Payload(opened), payload)
    with pytest.raises(KeyError):
        PayloadFile(path)["absent"]


def test_opening_a_file_does_not_read_its_tensors(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    path.write_bytes(EXAMPLE.encode())
    opened = PayloadFile(path)
    path.write_bytes(EXAMPLE.encode()[:-4])
    assert opened["n"] == 3
    with pytest.raises(PayloadError, match=r"^the file is not a payload: ") as caught:
        opened["model/w"]
    assert caught.value.where == str(path)


def test_a_file_that_was_cut_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    path.write_bytes(EXAMPLE.encode()[:-4])
    with pytest.raises(PayloadError) as caught:
        PayloadFile(path)
    assert caught.value.what == "the bytes are not a payload: its tensors take 32 bytes, 28 are there"
    assert caught.value.where == str(path)


def test_ten_gigabytes_of_header_are_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    with path.open("wb") as file:
        file.write((10_000_000_000).to_bytes(8, "little"))
        file.truncate(10_000_000_008)
    with pytest.raises(PayloadError) as caught:
        PayloadFile(path)
    assert caught.value.what == (
        "the bytes are not a payload: its header of 10,000,000,000 bytes is longer than 16,777,216"
    )


def test_a_file_with_a_bad_key_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    path.write_bytes(save({"a//b": torch.ones(1)}))
    with pytest.raises(PayloadError, match="is no key of a payload"):
        PayloadFile(path)


def test_the_header_is_the_same_from_bytes_and_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "p.safetensors"
    path.write_bytes(EXAMPLE.encode())
    header = read_header(path)
    assert header == read_header(EXAMPLE.encode())
    assert header["model/w"] == {"dtype": "F32", "shape": [2, 3], "data_offsets": [8, 32]}
