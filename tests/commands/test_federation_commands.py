"""The command line of a federation: what is printed, and what a mistake says before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from fedfuse.cli import app
from fedfuse.core.errors import FedfuseError

pytest.importorskip("flwr")


def said(*arguments: str) -> str:
    """What a command prints, or the error that it ends with."""
    result = CliRunner().invoke(app, list(arguments))
    if isinstance(result.exception, FedfuseError):
        return str(result.exception)
    assert result.exit_code == 0, result.output
    return result.output


def test_certificates_and_their_next_steps(tmp_path: Path) -> None:
    text = said(
        "certs", str(tmp_path / "certs"), "--clients", "a, b", "--host", "fed.example.org", "--host", "10.0.0.5"
    )
    assert f"to b, and to nobody else: the folder {tmp_path / 'certs' / 'b'}" in text
    assert (tmp_path / "certs" / "a" / "a.key").exists()


def test_serving_needs_certificates_or_insecure(tmp_path: Path, repository: Path) -> None:
    config = str(repository / "examples" / "federation" / "digits.yaml")
    common = ["serve", config, "--address", "127.0.0.1:1", "--out", str(tmp_path / "run")]
    assert said(*common) == (
        "there are no certificates\n  where: --certs\n"
        "  fix:   fedfuse certs DIR --clients NAME,NAME --host HOST makes some"
    )
    assert said(*common, "--insecure", "--deadline", "soon").startswith('"soon" is no duration')
    # A configuration of a simulation names nobody.
    assert said(*common, "--insecure").startswith("nothing says who takes part\n  where: federation.clients")
    assert not (tmp_path / "run" / "flower").exists()


def test_joining_needs_keys_or_insecure(tmp_path: Path) -> None:
    common = ["join", "--server", "localhost:1", "--name", "a", "--data", str(tmp_path / "a.npz")]
    home = ["--home", str(tmp_path / "home")]
    assert said(*common, *home).startswith("a client joins with the server's ca.pem and a key of its own")
    assert said(*common, *home, "--preview").startswith("there is no terminal to ask the owner at")


def test_status_and_the_app_folder(tmp_path: Path) -> None:
    assert said("status", str(tmp_path)).startswith("nothing has happened in this folder yet")
    assert f"wrote {tmp_path / 'app' / 'pyproject.toml'}" in said("flower-app", str(tmp_path / "app"))
