"""Both sides of a federation as apps of a Flower that somebody runs already; see ``fedfuse flower-app``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfuse.commands.consent import Consent
from fedfuse.core.errors import ConfigError

if TYPE_CHECKING:
    from fedfuse.runtimes.flower.apps import ClientApp, Context, Grid, ServerApp
    from fedfuse.runtimes.flower.node import Node


def server_app() -> ServerApp:
    """The server's side: runs the method of the configuration that the run's settings name."""
    from fedfuse.runtimes.flower.apps import build_server_app

    return build_server_app(_serve)


def client_app() -> ClientApp:
    """A client's side: the node's configuration says who it is and where its data are."""
    from fedfuse.runtimes.flower.node import build_client_app

    return build_client_app(_open_node)


def _serve(grid: Grid, context: Context) -> None:
    from fedfuse.commands.serving import Federation
    from fedfuse.commands.serving_screen import ServingLive
    from fedfuse.experiment import read_config
    from fedfuse.report import print_result, write_report

    folder = Path(_text(context.run_config, "out", "run config"))
    config = read_config(Path(_text(context.run_config, "config", "run config")))
    live = ServingLive(folder)
    with live:
        result = Federation.of(config, folder, None).fuse(grid, live)
    print_result(result.facts)
    write_report(folder)


def _open_node(context: Context) -> Node:
    from fedfuse.commands.joining import Joining, make_node
    from fedfuse.core.sealing import SigningKey
    from fedfuse.experiment.contributing import own_data

    table = context.node_config
    joining = Joining(
        server="",
        name=_text(table, "name", "node config"),
        data=Path(_text(table, "data", "node config")),
        source=str(table.get("source", "")),
        home=Path(str(table["home"])) if "home" in table else None,
        device=str(table.get("device", "cpu")),
        refuse=str(table.get("refuse", "")).split(),
    )
    dataset = own_data(None, joining.name, joining.data, joining.source)
    key = SigningKey.load_or_make(Path(str(table.get("key", joining.folder / "key.pem"))))
    return make_node(joining, key, dataset, Consent(joining.folder, refuse=joining.refuse))


def _text(table: Mapping[str, Any], key: str, where: str) -> str:
    value = table.get(key)
    if not isinstance(value, str) or not value:
        raise ConfigError(f'there is no "{key}"', where=where, fix=f'give {key}="..." there')
    return value
