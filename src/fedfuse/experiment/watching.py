"""What a run says of its method and of its clients that neither says of itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from fedfuse.analysis import Screening
from fedfuse.core.cohort import Cohort, Replies
from fedfuse.core.expecting import Expectation
from fedfuse.core.method import Job, Task
from fedfuse.core.payload import Payload


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


class WatchedCohort(Cohort):
    """A cohort whose uploads are looked over, exchange by exchange, as the method sees them.

    Args:
        screening: looks.
        tell: called with a sentence about each upload that looks wrong.
        log: called with a table for ``metrics.jsonl``.
        settings: of the cohort.
    """

    def __init__(
        self,
        *,
        screening: Screening,
        tell: Callable[[str], None],
        log: Callable[[Mapping[str, Any]], None] = lambda facts: None,
        **settings: Any,
    ) -> None:
        super().__init__(log=log, **settings)
        self.screening, self._tell, self._note = screening, tell, log

    def ask(
        self,
        task: Task,
        send: Payload | Mapping[str, Payload] | None = None,
        *,
        key: str,
        expect: Callable[[str], Expectation] | Expectation | None = None,
        quorum: float | None = None,
        timeout_s: float | None = None,
    ) -> Replies:
        """Ask clients as every cohort does, and look at what came.

        Args:
            task: a function of the method.
            send: one message for all clients, or client id to its message.
            key: name of the exchange.
            expect: what an upload must look like.
            quorum: fraction of the asked clients that must answer.
            timeout_s: most seconds that one client may take.

        Returns:
            The replies.
        """
        replies = super().ask(task, send, key=key, expect=expect, quorum=quorum, timeout_s=timeout_s)
        start = time.perf_counter()
        digests = self.uploads.get(key, {})
        # Of a sum or a mean that hides its terms there is nothing to be seen.
        if set(replies) <= set(digests) and not self.releases.hides_single_uploads:
            uploads = {c: self.releases.own_part(u) for c, u in zip(replies, replies.uploads(), strict=True)}
            sent = {c: send if isinstance(send, Payload) else (send or {}).get(c, Payload()) for c in uploads}
            for suspect in self.screening.look(key, sent, uploads, digests):
                self._tell(f"the upload of {suspect.client} in {key} looks wrong: {suspect.reason}")
                self._note({"event": "suspect", **suspect.to_json()})
        # Neither the method's own work nor waiting for a client, but not the method's.
        self.waited_s += time.perf_counter() - start
        return replies
