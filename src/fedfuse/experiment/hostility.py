"""Hostile clients in a simulation: what carries their answers, and how far they came."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.cohort import Runtime
from fedfuse.core.settings import to_json
from fedfuse.data.attacks import HostileClients
from fedfuse.data.federate import FederatedData
from fedfuse.runtimes.hostile import HostileRuntime
from fedfuse.training.evaluation import evaluate


def with_hostile_clients(
    runtime: Runtime, hostile: HostileClients | None, model_of: Callable[[str], ModelSpec]
) -> Runtime:
    """The runtime, with forged answers where the attack forges some.

    Args:
        runtime: open.
        hostile: who attacks, and how; ``None`` is nobody.
        model_of: client id to the model that it owns.
    """
    if hostile is None or not hostile.attack.forges_uploads:
        return runtime
    facts = {"name": hostile.name, **to_json(hostile.attack)}
    return HostileRuntime(runtime, hostile.attack, hostile.clients, model_of, facts)


def attack_facts(
    hostile: HostileClients, models: Iterable[nn.Module], data: FederatedData, device: torch.device
) -> dict[str, Any]:
    """Who attacked, and how often the result does what the attackers want.

    Args:
        hostile: who, and how.
        models: what came out: one, or the clients' own.
        data: holds the test part.
        device: where models compute.

    Returns:
        ``name``, ``clients`` and ``success``: the share of test examples that get the label that the attackers want, in
        [0, 1]; ``None`` where they want none, or nothing can be measured.
    """
    wanted = hostile.wanted(data)
    rates = [] if wanted is None else [evaluate(model, wanted, device=device).accuracy for model in models]
    return {
        "name": hostile.name,
        "clients": [client_id for client_id in hostile.clients if client_id in data.clients],
        "success": statistics.fmean(rates) if rates else None,
    }
