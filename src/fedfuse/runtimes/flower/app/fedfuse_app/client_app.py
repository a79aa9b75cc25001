"""A client's side: takes the client's name, data and key from the node's configuration."""

from fedfuse.commands.flower_app import client_app

app = client_app()
