"""What a run's result scores, on the test set once and on the clients' validation parts."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from fedfuse.core.cohort import ClientFacts
from fedfuse.core.judging import Evaluation
from fedfuse.core.method import Fused
from fedfuse.data.federate import FederatedData
from fedfuse.training.evaluation import evaluate


@dataclass(frozen=True)
class Scores:
    """What a result scores.

    Args:
        accuracy: on the test set, in [0, 1]; the mean over clients where every client has a model of its own; ``None``
            without a test set.
        fused: all scores of the one model on the test set; ``None`` where there is none.
        metrics: scores beside the accuracy; likewise means where every client has a model of its own.
        clients: client id to what is known of it.
    """

    accuracy: float | None
    fused: Evaluation | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    clients: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def score_result(fused: Fused, data: FederatedData, known: Mapping[str, ClientFacts], device: torch.device) -> Scores:
    """Score what came out of a run.

    Args:
        fused: the result.
        data: the clients' data, as far as it is here, and the test set.
        known: who took part.
        device: where models are run.
    """
    module = None if fused.model is None else fused.model.module()
    seen = None
    if module is not None and data.test is not None:
        seen = evaluate(module, data.test, device=device, writes_answers=True)
    counts = data.label_counts()
    # The data of a client elsewhere were never seen.
    clients: dict[str, dict[str, Any]] = {
        client_id: {"num_examples": facts.num_examples}
        for client_id, facts in known.items()
        if client_id not in data.clients
    }
    own: dict[str, Evaluation] = {}
    for row, (client_id, part) in enumerate(data.clients.items()):
        accuracy, kind = None, ""
        if client_id in fused.personal and data.test is not None:
            own[client_id] = evaluate(
                fused.personal[client_id].module(), data.test, device=device, writes_answers=module is None
            )
            accuracy, kind = own[client_id].accuracy, "own model on test"
        elif module is not None and len(part.validation):
            accuracy, kind = evaluate(module, part.validation, device=device).accuracy, "fused model on validation"
        clients[client_id] = {
            "num_examples": len(part.train),
            "num_validation": len(part.validation),
            "label_counts": counts[row].tolist(),
            "accuracy": accuracy,
            "accuracy_kind": kind,
        }
    if seen is not None or not own:
        return Scores(None if seen is None else seen.accuracy, seen, {} if seen is None else seen.metrics, clients)
    names = sorted(set.intersection(*(set(one.metrics) for one in own.values())))
    metrics = {name: statistics.fmean(one.metrics[name] for one in own.values()) for name in names}
    return Scores(statistics.fmean(one.accuracy for one in own.values()), None, metrics, clients)
