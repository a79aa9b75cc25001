"""The server's side: runs the method that the configuration names."""

from fedfuse.commands.flower_app import server_app

app = server_app()
