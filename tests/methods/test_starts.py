"""Common first weights, or own ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from fedfuse.core.errors import ConfigError
from fedfuse.core.seeding import derive_seed
from fedfuse.methods.fedma import FedMA
from fedfuse.methods.otfusion import OTFusion
from fedfuse.training import LocalSGD

# So small a step that the weights stay where they began.
STILL = LocalSGD(num_epochs=1, learning_rate=1e-30)


def test_own_first_weights_differ_and_can_be_drawn_again(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1)
    fed.fuse(OTFusion(local=STILL, first_weights="own"))
    assert fed.cohort.ledger.exchanges() == ["own_models"]
    uploads = {c: fed.upload("own_models", c).group("model") for c in fed.data}
    for client_id, state in uploads.items():
        seed = derive_seed(fed.spec.seed, "own first weights", client_id)
        torch.testing.assert_close(state, dict(dataclasses.replace(fed.spec, seed=seed).build().state_dict()))
    assert not torch.equal(uploads["client_0"]["1.weight"], uploads["client_1"]["1.weight"])


def test_common_first_weights_are_the_question_of_every_method(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1)
    fed.fuse(OTFusion(local=STILL))
    fed.fuse(FedMA(local=STILL))
    assert fed.cohort.ledger.exchanges() == ["local_models"]
    assert all(entry.from_journal for entry in fed.cohort.ledger.entries)


def test_weights_that_are_given_are_not_drawn(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1)
    fed.job = dataclasses.replace(fed.job, model=dataclasses.replace(fed.spec, initial=fed.spec.build().state_dict()))
    with pytest.raises(ConfigError) as caught:
        fed.fuse(FedMA(local=STILL, first_weights="own"))
    assert str(caught.value) == (
        "the model comes with its weights, so clients cannot draw their own\n"
        "  where: method.first_weights\n"
        "  fix:   use first_weights: common, or a model of a family"
    )
