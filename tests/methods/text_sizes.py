"""A federation of clients that own transformers of different sizes and two families, on made texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.client import ClientSide, StateStore
from fedfuse.core.cohort import Cohort
from fedfuse.core.examples import ClientData, Examples
from fedfuse.core.journal import Journal
from fedfuse.core.method import Fused, Job, Method
from fedfuse.core.seeding import Rng
from fedfuse.models import spec
from fedfuse.runtimes.local import LocalRuntime

BERT = {"model_type": "bert", "vocab_size": 40, "intermediate_size": 24, "num_attention_heads": 2}
LLAMA = {"model_type": "llama", "vocab_size": 40, "intermediate_size": 24, "num_attention_heads": 2}
TEXT_MODELS: dict[str, dict[str, Any]] = {
    "a": {**BERT, "hidden_size": 8, "num_hidden_layers": 2},
    "b": {**BERT, "hidden_size": 16, "num_hidden_layers": 2},
    "c": {**BERT, "hidden_size": 24, "num_hidden_layers": 4},
    "d": {**LLAMA, "hidden_size": 16, "num_hidden_layers": 2},
}


def texts(n: int, seed: int) -> Examples:
    """Texts of ten tokens; those of class k hold mostly tokens from 10 k to 10 k + 9."""
    draw = torch.Generator().manual_seed(seed)
    y = torch.randint(0, 3, (n,), generator=draw)
    ids = torch.randint(0, 10, (n, 10), generator=draw) + 10 * y[:, None]
    noise = torch.randint(0, 40, (n, 10), generator=draw)
    return Examples(torch.where(torch.rand(n, 10, generator=draw) < 0.5, noise, ids).float(), y)


def run_texts(models: Mapping[str, ModelSpec], method: Method) -> tuple[Fused, Cohort, Job]:
    data = {c: ClientData(texts(48, k), texts(8, 50 + k), 3) for k, c in enumerate(models)}
    states = StateStore()
    sides = {c: ClientSide(c, data[c], models[c], states=states) for c in models}
    first = next(iter(models.values()))
    job = Job(model=first, rng=Rng(9), device=torch.device("cpu"), client_models=dict(models))
    runtime = LocalRuntime(sides, workers=1)
    cohort = Cohort(runtime=runtime, method=method, model_of=job.model_of, seed=1, journal=Journal(None))
    return method.fuse(cohort, job), cohort, job


def text_models(*names: str, **peft: Any) -> dict[str, ModelSpec]:
    """Models of the table by client, with frozen bases unless ``peft`` says otherwise."""
    return {
        name: spec(
            "transformers",
            {"config": TEXT_MODELS[name], "peft": peft or {"kind": "head"}},
            input_shape=(10,),
            num_classes=3,
            seed=2,
        )
        for name in names
    }
