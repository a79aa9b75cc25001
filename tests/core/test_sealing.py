"""Sealed messages: what was signed comes back, and anything else is refused with the reason."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.core.errors import ConfigError, FedfuseError, SealError
from fedfuse.core.payload import Payload
from fedfuse.core.sealing import SigningKey, check_public_key, read_sealed, seal, unseal, write_sealed

KEY = SigningKey.generate()
OTHER = SigningKey.generate()
LIMIT = 1 << 20
START = "the sealed message was refused: "


def refusal(data: bytes, max_bytes: int = LIMIT) -> str:
    with pytest.raises(SealError) as caught:
        unseal(data, max_bytes=max_bytes)
    return caught.value.what.removeprefix(START)


@given(
    st.dictionaries(st.text(min_size=1, max_size=9), st.integers() | st.text(max_size=9), max_size=4),
    st.dictionaries(st.from_regex(r"[a-z_]{1,9}", fullmatch=True), st.binary(max_size=99), max_size=4),
)
def test_what_was_sealed_comes_back(manifest: dict[str, Any], parts: dict[str, bytes]) -> None:
    sealed = unseal(seal(manifest, parts, KEY), max_bytes=LIMIT)
    assert (dict(sealed.manifest), dict(sealed.parts), sealed.public_key) == (manifest, parts, KEY.public_key)


def test_the_same_message_gives_the_same_bytes() -> None:
    assert seal({"b": 1, "a": 2}, {"y": b"1", "x": b"2"}, KEY) == seal({"a": 2, "b": 1}, {"x": b"2", "y": b"1"}, KEY)


@settings(max_examples=300)
@given(st.data())
def test_no_changed_byte_gets_through(data: st.DataObject) -> None:
    whole = seal({"kind": "contribution"}, {"upload": bytes(range(64))}, KEY)
    changed = bytearray(whole)
    position = data.draw(st.integers(0, len(whole) - 1))
    changed[position] ^= data.draw(st.integers(1, 255))
    try:
        sealed = unseal(bytes(changed), max_bytes=LIMIT)
    except FedfuseError:
        return
    # Only what means the same may differ: padding, or the case of a hexadecimal digit.
    assert (sealed.manifest, sealed.parts["upload"]) == ({"kind": "contribution"}, bytes(range(64)))
    assert sealed.public_key == KEY.public_key


def resealed(**changes: Any) -> bytes:
    """A message with some of its fields exchanged after signing."""
    payload = Payload.decode(seal({"a": 1}, {"upload": b"xyz"}, KEY))
    for key, value in changes.items():
        name = key.replace("__", "/")
        if value is None:
            del payload[name]
        else:
            payload[name] = value
    return payload.encode()


def signed(text: str, **parts: torch.Tensor) -> bytes:
    signature = KEY.sign(b"fedfuse sealed message 1\n" + text.encode()).hex()
    tensors = {f"part/{name}": part for name, part in parts.items()}
    return Payload({"manifest": text, "public_key": KEY.public_key, "signature": signature, **tensors}).encode()


def test_refusals() -> None:
    bytes_ = torch.tensor([1, 2], dtype=torch.uint8)
    manifest = Payload.decode(seal({"a": 2}, {"upload": b"xyz"}, KEY)).text("manifest")
    assert refusal(b"") == "the bytes are not a payload: 0 bytes with a header of 0"
    assert refusal(resealed(), max_bytes=10) == f"{len(resealed()):,} bytes are more than the limit of 10"
    assert refusal(resealed(manifest=manifest)) == "its signature does not fit its content"
    assert refusal(resealed(public_key=OTHER.public_key)) == "its signature does not fit its content"
    assert refusal(resealed(public_key="zz")) == "it is none"
    assert refusal(resealed(signature="00")) == "its signature does not fit its content"
    assert refusal(resealed(signature=None)).startswith('the payload has no string "signature"')
    assert refusal(resealed(part__upload=bytes_)) == 'the part "upload" was changed or damaged'
    assert refusal(resealed(part__upload=None)) == "its parts are not those that were signed"
    assert refusal(resealed(part__more=bytes_)) == "its parts are not those that were signed"
    assert refusal(resealed(upload=bytes_)) == '"upload" is no part'
    assert refusal(resealed(part__upload=bytes_.float())) == '"part/upload" is no part'
    assert refusal(signed("[]")) == "it is none"
    assert refusal(signed("{")) == "it is none"
    assert refusal(signed("[" * 100_000)) == "it is none"
    assert refusal(signed('{"format": 7, "manifest": {}, "parts": {}}')) == "its format is 7, this version reads 1"
    text = json.dumps({"format": 1, "manifest": {}, "parts": {"x": 3}})
    assert refusal(signed(text, x=bytes_)) == 'the part "x" was changed or damaged'


def test_what_a_reader_asks_for_may_be_missing() -> None:
    sealed = unseal(seal({"n": 1}, {}, KEY), max_bytes=LIMIT)
    with pytest.raises(SealError, match='the manifest has no text "n"'):
        sealed.text("n")
    with pytest.raises(SealError, match='the message has no part "upload"'):
        sealed.part("upload")


def test_files(tmp_path: Path) -> None:
    write_sealed(tmp_path / "a.fed", {"a": 1}, {"upload": b"x"}, KEY)
    assert read_sealed(tmp_path / "a.fed", max_bytes=LIMIT).parts == {"upload": b"x"}
    for path, message in ((tmp_path / "b.fed", "cannot read the message: No such file"), (tmp_path, "cannot read")):
        with pytest.raises(SealError, match=message) as caught:
            read_sealed(path, max_bytes=LIMIT)
        assert caught.value.where == str(path)
    with pytest.raises(SealError, match="bytes are more than the limit of 10") as caught:
        read_sealed(tmp_path / "a.fed", max_bytes=10)
    assert caught.value.where == str(tmp_path / "a.fed")


def test_keys_are_kept_for_their_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "home" / "key.pem"
    key = SigningKey.load_or_make(path)
    assert SigningKey.load_or_make(path).public_key == key.public_key == SigningKey.load(path).public_key
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert check_public_key(key.public_key.upper(), "x") == key.public_key
    with pytest.raises(ConfigError, match="cannot write the key: File exists"):
        KEY.save(path)


def test_files_that_hold_no_key(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    (tmp_path / "text").write_text("hello")
    curve = generate_private_key(SECP256R1()).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    (tmp_path / "curve").write_bytes(curve)
    for name, message in (
        ("text", "the file holds no signing key"),
        ("curve", "the file holds a key of another kind than Ed25519"),
        ("nothing", "cannot read the signing key: No such file or directory"),
    ):
        with pytest.raises(ConfigError, match=message):
            SigningKey.load(tmp_path / name)
    for text in ("", "12", "z" * 64, "00 " * 32):
        with pytest.raises(ConfigError, match="is no public key"):
            check_public_key(text, "federation.clients.a")


def test_a_blinded_fact_is_the_same_for_its_owner_and_another_for_everybody_else() -> None:
    assert KEY.blinded("data") == KEY.blinded("data")
    assert len({KEY.blinded("data"), KEY.blinded("other"), OTHER.blinded("data")}) == 3
    assert len(KEY.blinded("data")) == 64
