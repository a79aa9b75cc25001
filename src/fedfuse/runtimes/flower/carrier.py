"""What runs in the processes of Flower's simulation: one request of one client at a time, from the files of a spool."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedfuse.core.client import Reply, Request, perform
from fedfuse.core.errors import FedfuseError
from fedfuse.runtimes.flower.codec import Codec, check_codec, decode_message, encode_message, read_request
from fedfuse.runtimes.flower.spool import Spool, find_method

NO_LIMIT = 1 << 62
"""Between processes of one owner nothing is too large; the cohort judges uploads."""

_LOOK_S = 0.25
_STARTED, _LATE = "started", "late"


def build_carrier_app(folder: Path) -> ClientApp:
    """The ClientApp that carries out any client's request.

    Flower's virtual nodes have nothing of their own here: whichever is free carries the next client. So a thousand
    clients need no thousand nodes, and requests wait at the server, where they cost nothing.

    Args:
        folder: of the spool; all that travels to Ray's processes.
    """
    app = ClientApp()
    app.train()(partial(_answer, str(folder)))
    return app


def _answer(folder: str, message: Message, context: Context) -> Message:
    return Message(carry_out(Spool(Path(folder)), message.content), reply_to=message)


def carry_out(spool: Spool, content: RecordDict) -> RecordDict:
    """Carry out one request.

    Ray asks a second time when the process died of the first try; a mark tells that, so that one client's fault costs
    that client and no more.

    Args:
        spool: holds the client.
        content: of the message.

    Returns:
        Content of the answer; a failure is an answer too.
    """
    header, payload = decode_message(content, max_bytes=NO_LIMIT)
    request, limit_s = read_request(header["request"], payload), header["timeout_s"]
    codec: Codec = check_codec(header["codec"])
    mark = spool.mark(request.answer_key)
    past = mark.read_text() if mark.exists() else None
    if spool.stop.exists():
        reply = _failed(request, "the run was stopped")
    elif past is not None:
        reply = _failed(request, f"no reply within {limit_s:g} s" if past == _LATE else "its process died")
    else:
        reply = _perform(spool, request, header["module"], mark, limit_s)
    mark.unlink(missing_ok=True)
    facts = {key: value for key, value in asdict(reply).items() if key != "upload"}
    return encode_message({**facts, "has_upload": reply.upload is not None}, reply.upload or b"", codec=codec)


def _perform(spool: Spool, request: Request, module: str, mark: Path, limit_s: float | None) -> Reply:
    try:
        # What a fresh process has to load is not the client's time.
        find_method(request.method, module)
        side = spool.side(request.client_id)
    except FedfuseError as error:
        return _failed(request, str(error))
    with _watched(spool, mark, limit_s):
        return perform(request, side)


def _failed(request: Request, reason: str) -> Reply:
    return Reply(request.client_id, error=reason, answer_key=request.answer_key)


@contextmanager
def _watched(spool: Spool, mark: Path, limit_s: float | None) -> Iterator[None]:
    """End this process when a client takes too long or the run is stopped: a task cannot be interrupted otherwise."""
    done, start = threading.Event(), time.monotonic()
    # The machine process of Ray may be gone before this begins: a fresh process takes seconds to load.
    parent = int(os.environ.get("RAY_RAYLET_PID", os.getppid()))
    mark.write_text(_STARTED)

    def watch() -> None:
        while not done.wait(_LOOK_S):
            if limit_s is not None and time.monotonic() - start > limit_s:
                mark.write_text(_LATE)
                os._exit(1)
            # Without the process that started it, nobody waits for the answer.
            if spool.stop.exists() or not spool.folder.exists() or os.getppid() != parent:
                os._exit(1)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
