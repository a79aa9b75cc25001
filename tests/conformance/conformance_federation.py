"""A small federation that every registered method is run on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pytest

from fedfuse.core.client import ClientSide, Reply, Request
from fedfuse.core.cohort import ClientFacts
from fedfuse.core.registry import METHODS, RUNTIMES, register_runtime
from fedfuse.runtimes.local import LocalRuntime

CONFIG: dict[str, Any] = {
    "seed": 3,
    "data": {
        "source": "digits",
        "limit": 300,
        "test_limit": 100,
        "partition": {"scheme": "dirichlet", "num_clients": 3, "dirichlet_alpha": 0.5},
    },
    "model": {"family": "cnn", "width": 4, "depth": 2, "norm": "batch"},
    "method": {"name": "local", "local": {"num_epochs": 2, "batch_size": 32}},
    "runtime": {"name": "local", "workers": 1},
    "server": {"threads": 1},
}

_LITTLE_SYNTHESIS = {
    "synthesis": {"num_epochs": 2, "num_steps": 2, "batch_size": 16, "width": 8},
    "distillation": {"batch_size": 16},
}

SETTINGS: dict[str, dict[str, Any]] = {
    "adi": _LITTLE_SYNTHESIS,
    "coboosting": _LITTLE_SYNTHESIS,
    "dafl": _LITTLE_SYNTHESIS,
    "dense": _LITTLE_SYNTHESIS,
    "fedcvae": {
        "autoencoding": {"num_epochs": 2, "width": 4},
        "classifier": {"num_epochs": 1},
        "num_draws": 64,
    },
    "feddf": {"data": "noise", "num_noise": 64, "num_passes": 2},
    "fedsd2c": {"images_per_class": 2, "num_crops": 2, "num_steps": 2, "num_passes": 2},
    "fusefl": {"num_blocks": 2},
    "intactofl": _LITTLE_SYNTHESIS,
    "afl": {"backbone": {"num_features": 64}},
    "ccvr": {"head": {"num_draws": 50, "num_epochs": 2}},
    "fedpft": {"backbone": {"num_features": 64}, "head_training": {"num_epochs": 3}},
    "lda": {"backbone": {"num_features": 64}},
    "fedavg": {"num_rounds": 2},
    "fedprox": {"num_rounds": 2},
    "fedadam": {"num_rounds": 2},
    "feddyn": {"num_rounds": 2},
    "fednova": {"num_rounds": 2},
    "scaffold": {"num_rounds": 2},
    "fens": {"num_rounds": 4},
    "linear_weights": {"num_rounds": 4},
}
"""Settings that a method needs to be run on so little; a new method usually needs none."""

TRAINS = {"local": {"num_epochs": 2, "batch_size": 32}}


def section(name: str) -> dict[str, Any]:
    """The configuration's section of one method."""
    fields = METHODS.get(name).__dataclass_fields__
    trains = {key: value for key, value in TRAINS.items() if key in fields}
    return {"name": name, **trains, **SETTINGS.get(name, {})}


@register_runtime("faulty")
@dataclass(frozen=True, kw_only=True)
class Faulty:
    """The local runtime with a client that never answers, or a server that dies after some replies."""

    absent: str = ""
    dies_after: int = -1

    def open(self, sides: Mapping[str, ClientSide]) -> FaultyRuntime:
        return FaultyRuntime(sides, self)


class Died(Exception):
    """Stands for the end of the process."""


class FaultyRuntime:
    def __init__(self, sides: Mapping[str, ClientSide], faults: Faulty) -> None:
        self._inner, self._faults = LocalRuntime(sides, workers=1), faults
        self.num_replies = 0

    def clients(self) -> Mapping[str, ClientFacts]:
        return self._inner.clients()

    def exchange(
        self, requests: Sequence[Request], *, timeout_s: float | None, progress: Callable[[str, int, int], None]
    ) -> Iterator[Reply]:
        for reply in self._inner.exchange(requests, timeout_s=timeout_s, progress=progress):
            if self.num_replies == self._faults.dies_after:
                raise Died
            self.num_replies += 1
            if reply.client_id == self._faults.absent:
                reply = Reply(reply.client_id, error="the client has left")
            yield reply

    def close(self) -> None:
        self._inner.close()


@pytest.fixture(autouse=True)
def _faulty_is_known() -> None:
    assert "faulty" in RUNTIMES.names()
