"""Federations of a tiny model with LoRA adapters, and changes of weights by their definition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedfuse.core.artifact import Artifact, ModelSpec, detached_state, load_state
from fedfuse.models import spec
from fedfuse.models.foundation import Foundation
from fedfuse.training import LocalSGD

BERT: dict[str, Any] = {
    "model_type": "bert",
    "vocab_size": 16,
    "hidden_size": 12,
    "intermediate_size": 10,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 12,
    "initializer_range": 0.3,
}
# Without dropout a step can be done again by hand.
PLAIN = {**BERT, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LENGTH = 8
LOCAL = LocalSGD(num_epochs=4, batch_size=8, learning_rate=0.2)


def settings(rank: int = 2, kind: str = "lora", config: Mapping[str, Any] = PLAIN, **peft: Any) -> dict[str, Any]:
    """Settings of the family ``transformers``."""
    targets = ["value", "output.dense"] if config["model_type"] == "bert" else []
    return {"config": dict(config), "peft": {"kind": kind, "rank": rank, "target_modules": targets, **peft}}


def tiny(rank: int = 2, **peft: Any) -> ModelSpec:
    """The model of four classes."""
    facts: dict[str, Any] = {"input_shape": (LENGTH,), "num_classes": 4, "seed": 11}
    return spec("transformers", settings(rank, **peft), **facts)


def lora_federation(federation: Any, rank: int = 2, ranks: Mapping[str, int] | None = None, **others: Any) -> Any:
    """Three clients with tiny models; ``ranks`` gives single clients another rank."""
    keys = ("kind", "config", "lora_alpha", "dropout", "layers")
    peft = {key: others.pop(key) for key in keys if key in others}
    own = {client_id: ("transformers", settings(own_rank, **peft)) for client_id, own_rank in (ranks or {}).items()}
    return federation("transformers", input_shape=(LENGTH,), client_models=own, **others, **settings(rank, **peft))


def changes(model: ModelSpec | Artifact, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every weight's change by the definition: scale times B times A, in float64."""
    module: Any = model.build() if isinstance(model, ModelSpec) else model.module()
    found = {}
    for key, right in state.items():
        if ".lora_A." in key:
            name = key.partition(".lora_A.")[0]
            scale = module.get_submodule(name).scaling["default"]
            found[name] = scale * (state[key.replace("lora_A", "lora_B")].double() @ right.double())
    return found


def weighted(fed: Any, exchange: str) -> dict[str, Tensor]:
    """The exact weighted sum of what the clients uploaded in an exchange."""
    total = sum(len(data.train) for data in fed.data.values())
    found: dict[str, Tensor] = {}
    for client_id, data in fed.data.items():
        own = changes(fed.job.model_of(client_id), fed.upload(exchange, client_id).group("model"))
        for name, delta in own.items():
            found[name] = found.get(name, torch.zeros_like(delta)) + len(data.train) / total * delta
    return found


def mean_of(fed: Any, exchange: str, key: str) -> Tensor:
    """The weighted mean of one uploaded tensor."""
    total = sum(len(data.train) for data in fed.data.values())
    parts = [len(d.train) / total * fed.upload(exchange, c).tensor(key).double() for c, d in fed.data.items()]
    return torch.stack(parts).sum(0)


def assert_close(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], atol: float = 1e-6) -> None:
    assert set(found) == set(wanted)
    for name, delta in wanted.items():
        assert float(delta.abs().max()) > 1e-3, "nothing was learnt that could be compared"
        torch.testing.assert_close(found[name], delta, rtol=0, atol=atol)


def by_hand(model: ModelSpec, deltas: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> Foundation:
    """The model whose base's weights have full changes added to them, with fresh adapters."""
    module = model.build()
    assert isinstance(module, Foundation)
    for name, delta in deltas.items():
        weight = module.weight_of(name)
        weight.data = (weight.data.double() + delta).float()
    load_state(module, {**detached_state(module), **others})
    return module.eval()
