"""The Flower app folder: what is written, that Flower takes it, and that both of its sides work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("flwr")

from flwr.app import Context, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.clientapp import ClientApp

from fedfuse.commands.flower_app import _open_node, client_app, server_app
from fedfuse.core.errors import ConfigError
from fedfuse.runtimes.flower.app_folder import app_files, write_app_folder


def test_the_folder_is_written_once(tmp_path: Path) -> None:
    written = write_app_folder(tmp_path / "app")
    names = sorted(path.relative_to(tmp_path / "app").as_posix() for path in written)
    assert names == [
        "README.md",
        "fedfuse_app/__init__.py",
        "fedfuse_app/client_app.py",
        "fedfuse_app/server_app.py",
        "pyproject.toml",
    ]
    assert (tmp_path / "app" / "pyproject.toml").read_bytes() == app_files()["pyproject.toml"]
    with pytest.raises(ConfigError, match="the folder is not empty"):
        write_app_folder(tmp_path / "app")


def test_the_copy_in_the_repository_is_the_same(repository: Path) -> None:
    copy = repository / "apps" / "flower"
    found = {
        path.relative_to(copy).as_posix(): path.read_bytes()
        for path in sorted(copy.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert found == app_files()


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_flower_takes_it_and_no_tool_fetches_torch() -> None:
    fab, _ = build_fab_from_files(app_files())
    assert len(fab) > 1000
    assert b"dependencies = []" in app_files()["pyproject.toml"]


def test_both_sides_are_apps() -> None:
    assert isinstance(client_app(), ClientApp)
    assert callable(server_app())


def context(config: dict[str, Any]) -> Context:
    return Context(1, 2, config, RecordDict(), {})


def test_a_node_is_made_from_its_configuration(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros((4, 1, 8, 8), dtype=np.float32), y=np.arange(4))
    node = _open_node(context({"name": "a", "data": str(tmp_path / "a.npz"), "home": str(tmp_path / "home")}))
    again = _open_node(context({"name": "a", "data": str(tmp_path / "a.npz"), "home": str(tmp_path / "home")}))
    assert node.name == "a"
    assert node.key.public_key == again.key.public_key


@pytest.mark.parametrize(("config", "key"), [({}, "name"), ({"name": "a"}, "data"), ({"name": 3}, "name")])
def test_what_a_node_s_configuration_lacks_is_named(config: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        _open_node(context(config))
    assert str(caught.value) == f'there is no "{key}"\n  where: node config\n  fix:   give {key}="..." there'
