"""A bad network in one process: a TCP proxy that delays, throttles, cuts and goes dark on demand."""

from __future__ import annotations

import random
import select
import socket
import threading
import time
from contextlib import suppress


class BadNetwork:
    """Carries connections from a port of its own to another one, badly.

    Network namespaces need rights that few machines give; this one works everywhere, and breaks
    connections at any byte.

    Args:
        port: where the server listens on the loopback address.
        delay_s: added to every piece of data, in either direction.
        bytes_per_s: most that one connection carries in either direction.
        cut_every_bytes: a connection is broken after about as many bytes; 0 never breaks one.
        seed: of where it breaks.
    """

    def __init__(
        self, port: int, *, delay_s: float = 0.0, bytes_per_s: float = 1e9, cut_every_bytes: int = 0, seed: int = 0
    ) -> None:
        self._target, self._delay_s, self._bytes_per_s = port, delay_s, bytes_per_s
        self._cut_every_bytes, self._random = cut_every_bytes, random.Random(seed)
        self.is_dark = False
        self.num_connections = self.num_cuts = self.num_bytes = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._is_open = True
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Carry nothing any more."""
        self._is_open = False
        self._listener.close()

    def _accept(self) -> None:
        while self._is_open:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            if self.is_dark:
                near.close()
                continue
            self.num_connections += 1
            threading.Thread(target=self._carry, args=(near,), daemon=True).start()

    def _carry(self, near: socket.socket) -> None:
        left = self._random.randint(1, 2 * self._cut_every_bytes) if self._cut_every_bytes else 1 << 62
        with suppress(OSError), near, socket.create_connection(("127.0.0.1", self._target)) as far:
            other = {near: far, far: near}
            while self._is_open:
                if self.is_dark:
                    self.num_cuts += 1
                    return
                for side in select.select(list(other), [], [], 0.1)[0]:
                    data = side.recv(min(65536, left))
                    if not data:
                        return
                    time.sleep(self._delay_s + len(data) / self._bytes_per_s)
                    other[side].sendall(data)
                    self.num_bytes += len(data)
                    left -= len(data)
                    if left <= 0:
                        self.num_cuts += 1
                        return
