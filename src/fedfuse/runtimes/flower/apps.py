"""The server's side as Flower's own ServerApp, for a SuperLink that somebody runs already."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context as Context
from flwr.clientapp import ClientApp as ClientApp
from flwr.serverapp import Grid as Grid
from flwr.serverapp import ServerApp as ServerApp


def build_server_app(serve: Callable[[Grid, Context], None]) -> ServerApp:
    """A ServerApp whose whole work is one function.

    Args:
        serve: carries out a federation over the grid; the context holds the run's settings.
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(grid, context)

    return app
