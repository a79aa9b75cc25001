"""A client that has only the configuration finds the question that the server will ask it first, for every method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
from conformance_federation import config_of

from fedfuse.core.client import ClientSide, Reply, Request
from fedfuse.core.cohort import ClientFacts
from fedfuse.core.errors import FedfuseError
from fedfuse.core.registry import METHODS
from fedfuse.experiment import read_config, resolve
from fedfuse.experiment.agreement import Agreement
from fedfuse.experiment.configuration import named
from fedfuse.experiment.contributing import agreement_of, first_request
from fedfuse.experiment.result import Observer
from fedfuse.experiment.running import run_method
from fedfuse.experiment.setting import Loader

NAMES = METHODS.names()


class Deaf:
    """Learns what is asked and never answers."""

    def __init__(self, facts: Mapping[str, ClientFacts]) -> None:
        self.facts = facts
        self.requests: list[Request] = []

    def clients(self) -> Mapping[str, ClientFacts]:
        return self.facts

    def exchange(
        self, requests: Sequence[Request], *, timeout_s: float | None, progress: Callable[[str, int, int], None]
    ) -> Iterator[Reply]:
        self.requests += requests
        return iter(())

    def close(self) -> None: ...


@pytest.mark.parametrize("name", NAMES)
def test_the_first_question_needs_no_server(name: str) -> None:
    config = read_config(config_of(name))
    setting = Loader(config).setting(config.seed)
    sides = {client_id: ClientSide(client_id, part, setting.model) for client_id, part in setting.data.clients.items()}
    facts = {client_id: ClientFacts(side.data.fingerprint) for client_id, side in sides.items()}
    deaf = Deaf(facts)
    with pytest.raises(FedfuseError):
        run_method(
            setting.without_clients(),
            named(METHODS, config.method.name, config.method.others, "method"),
            config,
            resolve(config),
            label=name,
            folder=None,
            observer=Observer(),
            runtime=deaf,
        )
    agreement = Agreement.decode(agreement_of(config).encode())
    asked = {request.client_id: request for request in deaf.requests}
    assert sorted(asked) == sorted(facts)
    for client_id, request in asked.items():
        assert first_request(agreement, client_id, facts[client_id]) == request
