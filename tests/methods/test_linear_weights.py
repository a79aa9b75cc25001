"""One weight per member: the pooled optimum, whatever the partition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedfuse
from fedfuse.core.artifact import load_state
from fedfuse.core.errors import ConfigError
from fedfuse.methods.fens import FENS
from fedfuse.methods.linear_weights import LinearWeights, NewtonSearch
from fedfuse.ops.stacking import stacking_terms
from fedfuse.training import LocalSGD, predict

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)


def test_the_weights_are_the_optimum_on_the_pooled_proxy_data(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fused = fed.fuse(LinearWeights(local=SETTINGS, ridge=0.05, num_rounds=30))
    weights = fused.model.state["combiner.weights"].double()
    logits = []
    for client_id in fed.cohort.client_ids:
        module = fed.spec.build()
        load_state(module, fed.upload("local_models", client_id).group("model"))
        logits.append(torch.cat([predict(module, data.validation.x) for data in fed.data.values()]))
    labels = torch.cat([data.validation.y for data in fed.data.values()])
    _, gradient, _ = stacking_terms(torch.stack(logits, 1), labels, weights)
    slope = gradient / len(labels) + 0.05 * (weights - 1 / 3)
    assert float(slope.abs().max()) < 1e-4
    assert fed.job.facts["member_weights"] == [round(w, 4) for w in weights.tolist()]


def test_what_crosses_and_that_it_ends_by_itself(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fed.fuse(FENS(local=SETTINGS, num_rounds=1))
    fed.fuse(LinearWeights(local=SETTINGS, num_rounds=50))
    exchanges = fed.cohort.ledger.exchanges()
    assert exchanges[:3] == ["local_models", "proxy_logits", "weights_0"]
    assert len(exchanges) < 20
    # The models, and what they say of the proxy parts, are there already.
    known = {e.exchange for e in fed.cohort.ledger.entries if e.from_journal}
    assert known == {"local_models", "proxy_logits"}
    upload = fed.upload("weights_0", "client_0")
    assert {key: tuple(upload.tensor(key).shape) for key in upload} == {
        "stacking/gradient": (3,),
        "stacking/hessian": (6,),
        "stacking/loss": (),
    }
    torch.testing.assert_close(
        fed.message("weights_0", "client_0").tensor("weights"), torch.full((3,), 1 / 3, dtype=torch.float64)
    )


def test_a_strong_ridge_is_the_mean_of_the_logits(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fused = fed.fuse(LinearWeights(local=SETTINGS, ridge=1e9))
    torch.testing.assert_close(fused.model.state["combiner.weights"], torch.full((3,), 1 / 3))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1000), scale=st.floats(0.1, 20.0), ridge=st.floats(0.001, 1.0))
def test_the_search_finds_the_minimum_from_any_scale(seed: int, scale: float, ridge: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = scale * torch.randn(30, 3, 4, generator=generator)
    labels = torch.randint(0, 4, (30,), generator=generator)
    search = NewtonSearch(torch.full((3,), 1 / 3, dtype=torch.float64), ridge)
    is_done = False
    for _ in range(100):
        is_done = search.learn(*(term / 30 for term in stacking_terms(logits, labels, search.weights)))
        if is_done:
            break
    assert is_done
    _, gradient, _ = stacking_terms(logits, labels, search.best)
    assert float((gradient / 30 + ridge * (search.best - 1 / 3)).abs().max()) < 1e-3


def test_a_step_that_went_too_far_is_halved() -> None:
    search = NewtonSearch(torch.zeros(1, dtype=torch.float64), 1.0)
    one = torch.ones(1, dtype=torch.float64)
    # Slope -4, curvature 1 + 1: the next look is at 2.
    assert not search.learn(torch.tensor(5.0), -4 * one, torch.eye(1, dtype=torch.float64))
    assert search.weights.tolist() == [2.0]
    # 5 + 2 is more than 5, so the look after is half way.
    assert not search.learn(torch.tensor(5.0), one, torch.eye(1, dtype=torch.float64))
    assert search.weights.tolist() == [1.0]
    assert search.best.tolist() == [0.0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"ridge": 0.0}, "ridge is 0.0\n  where: method.ridge\n  fix:   give a number above 0"),
        ({"num_rounds": 0}, "num_rounds is 0\n  where: method.num_rounds\n  fix:   give at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        LinearWeights(**settings)
    assert str(caught.value) == message


def test_it_learns_digits() -> None:
    config: dict[str, Any] = {
        "data": {"source": "digits", "limit": 400, "test_limit": 200, "partition": {"scheme": "iid", "num_clients": 3}},
        "model": {"family": "mlp", "width": 32, "depth": 1},
        "runtime": {"name": "local", "workers": 1},
    }
    local = {"num_epochs": 5, "batch_size": 16, "learning_rate": 0.05}
    result = fedfuse.run({**config, "method": {"name": "linear_weights", "local": local}})
    assert result.accuracy is not None
    assert result.accuracy > 0.8
