"""A small federation that every registered method is run on."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fedfuse.core.client import ClientSide, Reply, Request
from fedfuse.core.cohort import ClientFacts
from fedfuse.core.registry import METHODS, MODELS, RUNTIMES, SOURCES, register_runtime
from fedfuse.core.settings import from_json
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
    "cellm": {"num_rounds": 2},
    "fedavg": {"num_rounds": 2},
    "fedkseed": {"num_rounds": 2, "num_seeds": 64, "local": {"num_steps": 12}},
    "ferret": {"num_rounds": 2, "num_coordinates": 256},
    "fedprox": {"num_rounds": 2},
    "fedadam": {"num_rounds": 2},
    "feddyn": {"num_rounds": 2},
    "fednova": {"num_rounds": 2},
    "scaffold": {"num_rounds": 2},
    "fens": {"num_rounds": 4},
    "fed_sb": {"num_rounds": 2},
    "fedex_lora": {"num_rounds": 2},
    "ffa_lora": {"num_rounds": 2},
    "flexlora": {"num_rounds": 2},
    "flora": {"num_rounds": 2},
    "linear_weights": {"num_rounds": 4},
}
"""Settings that a method needs to be run on so little; a new method usually needs none."""

TRAINS = {"local": {"num_epochs": 2, "batch_size": 32}}

LITTLE_BERT = {
    "family": "transformers",
    "config": {
        "model_type": "bert",
        "vocab_size": 17,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
    },
    "peft": {"kind": "lora", "rank": 2},
}

SPECIAL_MODELS: dict[str, dict[str, Any]] = {
    "fed_sb": LITTLE_BERT,
    "fedex_lora": LITTLE_BERT,
    "fedit": LITTLE_BERT,
    "ffa_lora": LITTLE_BERT,
    "flexlora": LITTLE_BERT,
    "flora": LITTLE_BERT,
}
"""Models of methods that cannot use the network on digits; theirs read the digits as 16 tokens."""

_NUM_TOKENS = 16
_HOME = tempfile.TemporaryDirectory(prefix="fedfuse-conformance-")


@cache
def token_file() -> str:
    """An archive with the digits as tokens: how dark each square of 2 x 2 pixels is, from 0 to 16."""
    dataset = SOURCES.get("digits")().load()
    arrays: dict[str, Any] = {}
    for end, part in (("", dataset.train), ("_test", dataset.test)):
        arrays[f"x{end}"] = (torch.nn.functional.avg_pool2d(part.x, 2).flatten(1) * 16).round().numpy()
        arrays[f"y{end}"] = part.y.numpy()
    file = Path(_HOME.name) / "tokens.npz"
    np.savez(file, **arrays)
    return str(file)


def config_of(name: str) -> dict[str, Any]:
    """The configuration that a method is run on."""
    config = {**CONFIG, "method": section(name)}
    if name in SPECIAL_MODELS:
        data = {**CONFIG["data"], "source": "npz", "path": token_file(), "normalize": "none"}
        config |= {"data": data, "model": SPECIAL_MODELS[name]}
    return config


def inputs_of(name: str, num_inputs: int) -> Tensor:
    """Some inputs as a method's models take them."""
    draw = torch.Generator().manual_seed(0)
    if name in SPECIAL_MODELS:
        return torch.randint(0, 17, (num_inputs, _NUM_TOKENS), generator=draw).float()
    return torch.rand(num_inputs, 1, 8, 8, generator=draw)


def own_model(name: str, norm: str) -> Callable[[], torch.nn.Module]:
    """A function that makes a model of four classes, for runs on data from Python."""
    if name in SPECIAL_MODELS:
        settings = {key: value for key, value in SPECIAL_MODELS[name].items() if key != "family"}
        kind = from_json(MODELS.get(SPECIAL_MODELS[name]["family"]), settings, where="model")
        return lambda: kind.build((_NUM_TOKENS,), 4)
    family = MODELS.get("cnn")(width=4, depth=2, norm=norm)
    return lambda: family.build((1, 8, 8), 4)


def odd_clients(name: str) -> list[tuple[Tensor, Tensor]]:
    """A client with one example, one with a single class, and one that lacks a class; inputs follow the labels."""
    draw = torch.Generator().manual_seed(1)
    labels = [torch.tensor([2]), torch.zeros(12, dtype=torch.int64), torch.arange(30) % 3]
    if name in SPECIAL_MODELS:
        drawn = [torch.randint(0, 6, (len(y), _NUM_TOKENS), generator=draw) for y in labels]
        return [(tokens.float() + 4 * y.view(-1, 1), y) for tokens, y in zip(drawn, labels, strict=True)]
    return [(torch.rand(len(y), 1, 8, 8, generator=draw) / 2 + y.view(-1, 1, 1, 1) / 6, y) for y in labels]


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
