"""Flower's programs as child processes begin here; a script of its own, so that they load nothing of this package.

A program gets a signal when the process that started it is gone, however that ended. The SuperLink gets a guard too.
A SuperLink serves three interfaces on one port: one for clients' nodes, one to command runs, one for server apps. Only
the first is for the outside: without accounts, whoever reaches the second can stop the run or start another.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_OPEN_TO_ALL = ("/v1/fleet/", "/health")
_PR_SET_PDEATHSIG = 1


def die_with_parent(parent: int, parting_signal: int) -> None:
    """Ask the system for a signal when the parent is gone, also when it is killed; called in the new process.

    Args:
        parent: its process id.
        parting_signal: what to get.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, parting_signal)
    if os.getppid() != parent:
        os._exit(1)


def is_own_machine(scope: Any) -> bool:
    """Whether a request comes from the machine that it goes to.

    Args:
        scope: the connection, as ASGI describes it.
    """
    client, server = scope.get("client"), scope.get("server")
    if not client:
        return False
    try:
        address = ipaddress.ip_address(client[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None) or address
    return bool(mapped.is_loopback or (server and client[0] == server[0]))


class OwnMachineOnly:
    """Answers what is not for clients with 404, unless it comes from this machine.

    Args:
        app: what answers otherwise.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or not.

        Args:
            scope: the connection.
            receive: gives the request.
            send: takes the response.
        """
        if scope["type"] == "http" and not scope["path"].startswith(_OPEN_TO_ALL) and not is_own_machine(scope):
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return
        await self.app(scope, receive, send)


def superlink() -> None:
    """Run the SuperLink with the guard outermost."""
    from flwr.superlink import extensions
    from flwr.superlink.cli import flower_superlink
    from starlette.middleware import Middleware

    others = extensions.get_middleware
    extensions.get_middleware = lambda: (Middleware(OwnMachineOnly), *others())
    flower_superlink()


def supernode() -> None:
    """Run the SuperNode."""
    from flwr.supernode.cli import flower_supernode

    flower_supernode()


def main() -> None:
    """Run what the command line names: parent's process id, parting signal, program, its own command line."""
    parent, parting_signal, program = sys.argv[1:4]
    die_with_parent(int(parent), int(parting_signal))
    sys.argv = [f"flower-{program}", *sys.argv[4:]]
    {"superlink": superlink, "supernode": supernode}[program]()


if __name__ == "__main__":
    main()
