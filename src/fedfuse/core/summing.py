"""One exchange whose answers are only ever added up: who may ask so, the question, and what the journal keeps of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol, runtime_checkable

from fedfuse.core.client import Request
from fedfuse.core.errors import ConfigError
from fedfuse.core.fixed_point import SUMS_WHERE, SumSettings
from fedfuse.core.journal import content_key
from fedfuse.core.method import Method, TaskSpec
from fedfuse.core.registry import METHODS
from fedfuse.core.settings import to_json
from fedfuse.core.sums import SUM, SumLayout, SumReply


@runtime_checkable
class AddsUp(Protocol):
    """A runtime that can bring back the total of the clients' uploads without seeing any of them."""

    def exchange_sum(
        self,
        requests: Sequence[Request],
        layout: SumLayout,
        settings: SumSettings,
        *,
        num_needed: int,
        timeout_s: float | None,
        progress: Callable[[str, int, int], None],
    ) -> SumReply:
        """Carry out requests and add up the uploads.

        Args:
            requests: at most one per client.
            layout: what is added up.
            settings: the operator's decisions.
            num_needed: with fewer clients there is no total.
            timeout_s: most seconds that one client may take; ``None`` is no limit.
            progress: called with (client id, done, total).
        """
        ...


def methods_that_need_only_sums() -> list[str]:
    """Names of all methods whose servers need no more than sums and weighted means of uploads, sorted."""
    return [name for name in METHODS.names() if METHODS.get(name).summed_tasks()]


def check_secure_aggregation(method: Method, mechanism: str | None, codec: str = "") -> None:
    """Refuse what secure aggregation cannot serve, before anybody is asked.

    Args:
        method: whose server would get sums.
        mechanism: of differential privacy; ``None`` is none.
        codec: that uploads are said in; empty is none.

    Raises:
        ConfigError: the server of this method, or of this kind of privacy or codec, needs single uploads.
    """
    if codec:
        raise ConfigError(
            f'codes of "{codec}" cannot be added up unseen',
            where="upload.codec",
            fix="leave the section upload out, or federation.secure_aggregation",
        )
    if not type(method).summed_tasks():
        raise ConfigError(
            f'the method "{method.name}" needs to see single uploads',
            where=SUMS_WHERE,
            fix=f"leave this section out, or use one of: {', '.join(methods_that_need_only_sums())}",
        )
    if mechanism in ("central", "trained"):
        raise ConfigError(
            f"the privacy mechanism {mechanism} needs to see single uploads",
            where="privacy.mechanism",
            fix="use mechanism: local, or leave federation.secure_aggregation out",
        )


@dataclass(frozen=True)
class SumQuestion:
    """The questions of one exchange, asked so that their answers are only ever added up.

    Args:
        requests: one per client.
        layout: what is added up.
        settings: the operator's decisions.
    """

    requests: Sequence[Request]
    layout: SumLayout
    settings: SumSettings

    @classmethod
    def of(
        cls,
        method: Method,
        spec: TaskSpec,
        requests: Sequence[Request],
        expect: Callable[[str], Mapping[str, Any] | None],
        settings: SumSettings,
    ) -> SumQuestion:
        """The question of an exchange.

        Args:
            method: who asks.
            spec: the task.
            requests: one per client, at least one.
            expect: client id to what its upload must look like.
            settings: the operator's decisions.

        Raises:
            ConfigError: the task's answers cannot be added up.
        """
        where = f"{method.name}, exchange {requests[0].exchange}"
        table = type(method).summed_tasks().get(spec.name)
        if table is None or spec.keeps_state:
            raise ConfigError(
                f'the answers to the task "{spec.name}" cannot be added up over clients without being seen',
                where=where,
                fix=f"use one of the methods {', '.join(methods_that_need_only_sums())}, or leave {SUMS_WHERE} out",
            )
        layouts = [SumLayout.of(expect(request.client_id) or {}, table, where) for request in requests]
        if any(layout != layouts[0] for layout in layouts) or not layouts[0].parts:
            raise ConfigError(
                "the clients' uploads do not look alike, so they cannot be added up",
                where=where,
                fix=f"give all clients one model, or leave {SUMS_WHERE} out",
            )
        return cls(requests, layouts[0], settings)

    @property
    def key(self) -> str:
        """Content key of the total: of all questions, and of how their answers become integers."""
        point = {key: value for key, value in to_json(self.settings).items() if key in ("clipping_range", "max_weight")}
        questions = sorted(request.answer_key for request in self.requests)
        return content_key({"sum of": questions, "layout": self.layout.to_json(), "point": point})

    def carry(
        self,
        runtime: object,
        *,
        num_needed: int,
        timeout_s: float | None,
        progress: Callable[[str, int, int], None],
    ) -> SumReply:
        """Let a runtime ask and add up.

        Args:
            runtime: the run's.
            num_needed: with fewer clients there is no total.
            timeout_s: most seconds that one client may take.
            progress: called with (client id, done, total).

        Raises:
            ConfigError: this runtime cannot add up without seeing.
        """
        if not isinstance(runtime, AddsUp):
            raise ConfigError(
                "this runtime sees every upload, so it cannot add them up unseen",
                where=SUMS_WHERE,
                fix="run the federation on Flower (fedfuse serve), or leave this section out",
            )
        return runtime.exchange_sum(
            self.requests,
            self.layout,
            self.settings,
            num_needed=num_needed,
            timeout_s=timeout_s,
            progress=progress,
        )

    def entry_facts(self, spec: TaskSpec, reply: SumReply) -> dict[str, Any]:
        """What the journal keeps beside a total.

        Args:
            spec: the task.
            reply: what the runtime brought back.
        """
        costs = reply.contributions
        return {
            "exchange": self.requests[0].exchange,
            "client": SUM,
            "task": spec.identity,
            "seconds": max((cost.seconds for cost in costs.values()), default=0.0),
            "peak_rss_bytes": max((cost.peak_rss_bytes for cost in costs.values()), default=0),
            "contributions": {client_id: asdict(costs[client_id]) for client_id in sorted(costs)},
            "missing": dict(sorted(reply.missing.items())),
        }

    def costs(self, facts: Mapping[str, Any]) -> Iterator[tuple[Request, Mapping[str, Any]]]:
        """What each client's part in a total cost, for the ledger.

        Args:
            facts: what :meth:`entry_facts` gave.

        Yields:
            A request, and the cost of its answer; nothing of clients that are not in the total.
        """
        for request in self.requests:
            if request.client_id in facts["contributions"]:
                yield request, facts["contributions"][request.client_id]
