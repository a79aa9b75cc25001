"""Every method for models of different sizes, on transformers of three sizes."""

from __future__ import annotations

import pytest
from text_sizes import run_texts, text_models, texts

from fedfuse.core.errors import ModelError
from fedfuse.core.method import Method
from fedfuse.methods.fedhm import FedHM
from fedfuse.methods.heterofl import HeteroFL
from fedfuse.methods.pfedlora import PFedLoRA
from fedfuse.methods.size_groups import SizeGroups
from fedfuse.methods.smallest import Smallest
from fedfuse.training import LocalSGD, predict

LOCAL = LocalSGD(num_epochs=2, batch_size=16, optimizer="adamw", learning_rate=0.01)


@pytest.mark.parametrize("method", [HeteroFL(local=LOCAL), FedHM(local=LOCAL)], ids=["heterofl", "fedhm"])
def test_weights_of_nested_or_thin_encoders_are_averaged(method: Method) -> None:
    models = text_models("a", "b", "c", kind="full")
    fused, _, _ = run_texts(models, method)
    sizes = {c: sum(p.numel() for p in a.module().parameters()) for c, a in fused.personal.items()}
    # Embeddings are no layers that could be thin: both smaller forms of fedhm have rank 1.
    assert sizes["a"] <= sizes["b"] < sizes["c"]
    assert sizes["c"] == sum(p.numel() for p in models["c"].build().parameters())
    inputs = texts(6, 99).x
    assert all(predict(a.module(), inputs).shape == (6, 3) for a in fused.personal.values())


@pytest.mark.parametrize("method", [SizeGroups(local=LOCAL), PFedLoRA(local=LOCAL)], ids=["size_groups", "pfedlora"])
def test_two_families_keep_their_models(method: Method) -> None:
    models = text_models("a", "c", "d", kind="lora", rank=2)
    fused, _, _ = run_texts(models, method)
    inputs = texts(6, 99).x
    assert list(fused.personal) == ["a", "c", "d"]
    assert all(predict(a.module(), inputs).shape == (6, 3) for a in fused.personal.values())


def test_the_smallest_of_two_families_is_one_for_all() -> None:
    fused, cohort, job = run_texts(text_models("a", "c", "d", kind="lora", rank=2), Smallest(local=LOCAL))
    assert fused.model is not None
    assert fused.model.recipe["base"]["config"]["model_type"] == "llama"
    # Adapters and the head: nothing of the base travels.
    assert job.facts["num_values"] == sum(t.numel() for t in fused.model.state.values()) < 500
    assert len({entry.upload_bytes for entry in cohort.ledger.entries}) == 1


def test_two_families_are_not_nested() -> None:
    with pytest.raises(ModelError, match="a client's model is no part of the largest one"):
        run_texts(text_models("a", "d"), HeteroFL(local=LOCAL))
