"""The noise's numbers, and the secret that it is made from."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch

from fedfuse.core.errors import ConfigError
from fedfuse.core.noise import Noise, noise_secret
from fedfuse.core.seeding import Rng

KEY = b"k" * 32


def test_the_numbers_are_standard_normal() -> None:
    z = Noise(KEY).normal("w", (100_000,))
    n = z.numel()

    # Six deviations of the mean, of chi-square with n degrees of freedom, and of the tail beyond two.
    assert abs(float(z.mean())) < 6 / n**0.5
    assert abs(float((z**2).sum()) - n) < 6 * (2 * n) ** 0.5
    tail = 0.0455
    assert abs(int((z.abs() > 2).sum()) - tail * n) < 6 * (tail * n) ** 0.5
    neighbours = float((z[1:] * z[:-1]).mean())
    assert abs(neighbours) < 6 / n**0.5


def test_the_numbers_depend_on_key_and_name_alone() -> None:
    noise = Noise(KEY)
    first = noise.normal("w", (3, 5))

    assert first.dtype == torch.float64
    assert torch.equal(first, Noise(KEY).normal("w", (3, 5)))
    assert not (first == noise.normal("v", (3, 5))).any()
    assert not (first == Noise(b"l" * 32).normal("w", (3, 5))).any()


def test_parts_of_a_long_stream_differ() -> None:
    part = 1 << 19
    z = Noise(KEY).normal("w", (part + 3,))

    assert z.isfinite().all()
    assert not torch.equal(z[part:], z[:3])


@pytest.mark.parametrize("shape", [(), (0,), (1,), (2, 0), (7,)])
def test_any_shape(shape: tuple[int, ...]) -> None:
    assert Noise(KEY).normal("w", shape).shape == shape


def test_a_secret_is_made_once_and_for_its_owner_alone(tmp_path: Path) -> None:
    path = tmp_path / "home" / "noise.key"
    secret = noise_secret(path)

    assert len(secret) == 32
    assert noise_secret(path) == secret
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [file.name for file in path.parent.iterdir()] == ["noise.key"]
    assert noise_secret(tmp_path / "other" / "noise.key") != secret


def test_a_damaged_secret_is_told(tmp_path: Path) -> None:
    path = tmp_path / "noise.key"
    path.write_bytes(b"short")

    with pytest.raises(ConfigError) as caught:
        noise_secret(path)

    assert str(caught.value) == (
        "the secret of the noise has 5 bytes, not 32\n"
        f"  where: {path}\n"
        "  fix:   put the file back from a copy; without it questions that are asked again get other noise"
    )


def test_a_home_that_is_no_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "home").write_text("")

    with pytest.raises(ConfigError, match="cannot keep the secret of the noise: File exists"):
        noise_secret(tmp_path / "home" / "noise.key")


def test_private_keys_need_the_secret() -> None:
    seeded, secret = Rng(3), Rng(3, b"s" * 32)

    assert seeded.private_key("noise") == Rng(3).private_key("noise")
    assert secret.private_key("noise") == Rng(3, b"s" * 32).private_key("noise")
    assert len({seeded.private_key("noise"), secret.private_key("noise"), secret.private_key("other")}) == 3
    assert secret.child("a").private_key("noise") != seeded.child("a").private_key("noise")
    # Everything that hides nothing is drawn as ever.
    assert torch.equal(torch.randn(3, generator=secret.torch("x")), torch.randn(3, generator=seeded.torch("x")))
    assert "sss" not in repr(secret)
