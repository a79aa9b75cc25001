"""Whether a method looked at the server's own data, so that an adviser need not believe what it says of itself."""

from __future__ import annotations

from typing import Any

from fedfuse.core.method import Job


class WatchedJob(Job):
    """A job that remembers whether the server's data was looked at."""

    @property
    def used_server_data(self) -> bool:
        """Whether there is some, and the method asked for it."""
        return bool(self.__dict__.get("_looked")) and self.__dict__["server_data"] is not None

    def __getattribute__(self, name: str) -> Any:
        if name == "server_data":
            object.__setattr__(self, "_looked", True)
        return super().__getattribute__(name)
