"""A runtime of which only some clients are asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedfuse.core.client import ClientSide, Request
from fedfuse.core.errors import ConfigError, RegistryError
from fedfuse.core.examples import ClientData, Examples
from fedfuse.core.payload import Payload
from fedfuse.models import spec
from fedfuse.runtimes.local import Local
from fedfuse.runtimes.selected import NOT_ASKED, Selected


def sides() -> dict[str, ClientSide]:
    model = spec("mlp", {"width": 4, "depth": 2}, input_shape=(3,), num_classes=2, seed=0)
    part = Examples(torch.ones(4, 3), torch.tensor([0, 1, 0, 1]))
    return {name: ClientSide(name, ClientData(part, part, 2), model) for name in ("a", "b")}


def request(client_id: str) -> Request:
    settings: dict[str, Any] = {"backbone": {"kind": "pixels"}}
    payload = Payload({"backbone/kind": "pixels", "backbone/seed": 1}).encode()
    return Request("afl", settings, "gram", "gram", client_id, 0, "", "0" * 40, payload)


def test_only_those_named_are_asked() -> None:
    runtime = Selected(inner={"name": "local", "workers": 1}, asks=["b"]).open(sides())
    requests = [request("a"), request("b")]
    replies = {r.client_id: r for r in runtime.exchange(requests, timeout_s=None, progress=lambda *facts: None)}
    assert replies["a"].upload is None
    assert replies["a"].error == NOT_ASKED
    assert replies["b"].upload is not None
    runtime.close()


def test_the_facts_are_those_of_the_inner_runtime() -> None:
    selected = Selected(inner={"name": "local", "workers": 1, "client_threads": 2, "device": "cpu"})
    assert selected.client_threads == 2
    assert selected.client_device() == torch.device("cpu")
    assert selected.open(sides()).clients() == Local(client_threads=2).open(sides()).clients()
    assert Selected(inner={"name": "replay"}).client_device() == torch.device("cpu")


def test_an_inner_runtime_must_be_named() -> None:
    with pytest.raises(ConfigError, match='the setting "name" is missing') as caught:
        Selected(inner={}).open({})
    assert caught.value.where == "runtime.inner.name"
    with pytest.raises(RegistryError, match='there is no runtime "lokal"'):
        Selected(inner={"name": "lokal"}).open({})
