"""The dynamic regulariser: the first-order condition, the fixed point, and the exchange."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

import fedfuse
from fedfuse.core.errors import ConfigError
from fedfuse.methods.feddyn import DynamicServer, FedDyn
from fedfuse.training import LocalSGD

RATE = 0.1
ONE_STEP = LocalSGD(num_epochs=2, batch_size=64, learning_rate=RATE, momentum=0.0)

DIGITS: dict[str, Any] = {
    "seed": 1,
    "data": {"source": "digits", "limit": 400, "test_limit": 200, "partition": {"scheme": "iid", "num_clients": 3}},
    "model": {"family": "mlp", "width": 32, "depth": 1},
    "runtime": {"name": "local", "workers": 1},
}


@settings(max_examples=10, deadline=None)
@given(
    minima=st.lists(st.floats(-5, 5), min_size=1, max_size=4),
    counts=st.lists(st.integers(1, 20), min_size=4, max_size=4),
    regularization=st.floats(0.1, 3.0),
)
def test_on_quadratics_solved_exactly_it_finds_the_common_minimum(
    minima: list[float], counts: list[int], regularization: float
) -> None:
    # L_k(w) = (w - b_k)^2 / 2: the bent minimum is w_k = (b_k + g_k + a w) / (1 + a);
    # there L_k'(w_k) = g_k - a (w_k - w), the first-order condition.
    heard = {f"client_{k}": counts[k] for k in range(len(minima))}
    total = sum(heard.values())
    server, w, slopes = DynamicServer(regularization), torch.zeros(1, dtype=torch.float64), [0.0] * len(minima)
    for _ in range(150):
        found = [(b + g + regularization * w) / (1 + regularization) for b, g in zip(minima, slopes, strict=True)]
        slopes = [float(g - regularization * (v - w)) for g, v in zip(slopes, found, strict=True)]
        for v, b, g in zip(found, minima, slopes, strict=True):
            assert float(v - b) == pytest.approx(g, abs=1e-9)
        mean = sum(n * v for n, v in zip(heard.values(), found, strict=True)) / total
        w = server.advance({"w": w}, {"w": mean}, heard)["w"]
    wanted = sum(n * b for n, b in zip(heard.values(), minima, strict=True)) / total
    assert float(w) == pytest.approx(wanted, abs=1e-5)


def test_a_client_that_is_away_keeps_its_part_in_the_mean_gradient() -> None:
    server, zero = DynamicServer(2.0), {"w": torch.zeros(1)}
    # h = -2 * 3 and w = 3 + 3: the mean and once more what it went.
    assert server.advance(zero, {"w": torch.tensor([3.0])}, {"a": 1, "b": 1})["w"].tolist() == [6.0]
    # Only a answers and goes by 1: h = (2 * -6 - 2 * 1) / 2 = -7, w = 1 + 3.5.
    assert server.advance(zero, {"w": torch.tensor([1.0])}, {"a": 1})["w"].tolist() == [4.5]


def test_single_steps_in_closed_form(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1)
    fused = fed.fuse(FedDyn(local=ONE_STEP, num_rounds=2, regularization=0.5)).model.state
    start = {name: p.detach() for name, p in fed.spec.build().named_parameters()}
    middle = fed.message("round_1", "client_0").group("model")
    counts = {c: len(d.train) for c, d in fed.data.items()}

    def gradients(client_id: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        module, data = fed.spec.build(), fed.data[client_id].train
        module.load_state_dict(state)
        found = torch.autograd.grad(F.cross_entropy(module(data.x), data.y), list(module.parameters()))
        return dict(zip(start, found, strict=True))

    first, second = ({c: gradients(c, state) for c in counts} for state in (start, middle))
    for name in start:
        # Round one: w_k = w - r g, kept -a (w_k - w) = a r g; the server adds the mean step once more.
        step = -RATE * sum(n * first[c][name] for c, n in counts.items()) / 96
        torch.testing.assert_close(middle[name], start[name] + 2 * step, rtol=1e-4, atol=1e-6)
        moves = {}
        for c in counts:
            kept = fed.kept(c)[0].tensor(f"gradient/{name}")
            torch.testing.assert_close(kept, 0.5 * RATE * first[c][name], rtol=1e-3, atol=1e-6)
            # Round two: the loss is bent by the kept gradient; the pull is zero at the start.
            moves[c] = -RATE * (second[c][name] - kept)
            upload = fed.upload("round_1", c).tensor(f"model/{name}")
            torch.testing.assert_close(upload, middle[name] + moves[c], rtol=1e-4, atol=1e-5)
        mean = sum(n * moves[c] for c, n in counts.items()) / 96
        torch.testing.assert_close(fused[name], middle[name] + 2 * mean + step, rtol=1e-4, atol=1e-5)


def test_it_learns_digits() -> None:
    local = {"num_epochs": 10, "batch_size": 16, "learning_rate": 0.05}
    result = fedfuse.run({**DIGITS, "method": {"name": "feddyn", "num_rounds": 5, "local": local}})
    assert result.accuracy is not None
    assert result.accuracy > 0.8


def test_it_uploads_no_more_than_fedavg(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fed.fuse(FedDyn(local=LocalSGD(num_epochs=2, batch_size=16), num_rounds=2))
    groups = {key.split("/")[0] for key in fed.upload("round_1", "client_0")}
    assert groups == {"model", "curve", "num_examples", "label_counts"}
    assert sorted(fed.message("round_1", "client_0").group("model")) == sorted(fed.spec.build().state_dict())


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_no_regularisation_is_refused(value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        FedDyn(regularization=value)
    assert str(caught.value) == (
        f"regularization is {value}\n  where: method.regularization\n  fix:   give a number above 0"
    )
