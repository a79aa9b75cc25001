"""Curvature and sketches against matrices that can be written down."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fedfuse.ops.smoothness import inner, largest_curvature, length, sketch, slope


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_slope_of_a_quadratic_by_hand() -> None:
    # f(a, b) = a^2 + 3 a b, at (2, 5): (2a + 3b, 3a) = (19, 6).
    a, b, c = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (2.0, 5.0, 1.0))
    assert [s.item() for s in slope(lambda: a**2 + 3 * a * b, [a, b, c])] == [19.0, 6.0, 0.0]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_power_iteration_finds_the_eigenvalue_of_a_known_matrix(seed: int) -> None:
    root = torch.randn(6, 6, dtype=torch.float64, generator=draw(seed))
    matrix = root @ root.T - torch.eye(6, dtype=torch.float64)
    w = torch.randn(6, dtype=torch.float64, generator=draw(9)).requires_grad_()
    found = largest_curvature(
        lambda: 0.5 * w @ matrix @ w + w.sum(), [w], generator=draw(), num_steps=2000, tolerance=1e-14
    )
    assert found.value == pytest.approx(torch.linalg.eigvalsh(matrix).abs().max().item(), rel=1e-9)
    assert found.has_settled


def test_power_iteration_against_the_whole_hessian_of_a_network() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(10, 3, dtype=torch.float64), torch.arange(10) % 2
    names, values = zip(*net.named_parameters(), strict=True)

    def loss_of(flat: torch.Tensor) -> torch.Tensor:
        pieces = flat.split([v.numel() for v in values])
        state = {n: p.view_as(v) for n, p, v in zip(names, pieces, values, strict=True)}
        return F.cross_entropy(torch.func.functional_call(net, state, x), y)

    hessian = torch.func.hessian(loss_of)(torch.cat([v.detach().reshape(-1) for v in values]))
    found = largest_curvature(
        lambda: F.cross_entropy(net(x), y), list(net.parameters()), generator=draw(), num_steps=500, tolerance=1e-12
    )
    assert abs(found.value) == pytest.approx(torch.linalg.eigvalsh(hessian).abs().max().item(), rel=1e-6)


def test_curvatures_of_opposite_sign_and_one_size_settle() -> None:
    # a b has the eigenvalues 1 and -1, like a product of two factors of which one begins at zero.
    a, b = (torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2))
    found = largest_curvature(lambda: 3 * a * b, [a, b], generator=draw(), num_steps=5)
    assert (abs(found.value), found.has_settled) == (pytest.approx(3.0), True)


def test_a_straight_loss_has_no_curvature() -> None:
    w = torch.ones(3, requires_grad=True)
    assert largest_curvature(lambda: 2 * w.sum(), [w], generator=draw()).value == 0.0
    assert largest_curvature(lambda: 0 * (w**2).sum(), [w], generator=draw()).value == 0.0


def test_few_steps_say_that_they_have_not_settled() -> None:
    w = torch.ones(2, dtype=torch.float64, requires_grad=True)
    found = largest_curvature(lambda: w[0] ** 2 + 0.9 * w[1] ** 2, [w], generator=draw(3), num_steps=2, tolerance=1e-9)
    assert (found.num_steps, found.has_settled) == (2, False)


def test_fused_attention_is_differentiated_twice() -> None:
    w = torch.randn(1, 1, 4, 8, generator=draw()).requires_grad_()
    found = largest_curvature(lambda: F.scaled_dot_product_attention(w, w, w).square().sum(), [w], generator=draw())
    assert found.value > 0


def test_sketches_add_up_and_keep_lengths_and_inner_products() -> None:
    first, second = (torch.randn(5000, generator=draw(seed)) for seed in (1, 2))
    both = first + second
    short = [sketch([v[:2000], v[2000:]], 1024, draw(7)) for v in (first, second, both)]
    torch.testing.assert_close(short[0] + short[1], short[2], rtol=1e-4, atol=1e-3)
    assert length([short[0]]) == pytest.approx(length([first]), rel=0.1)
    assert inner([short[0]], [short[2]]) == pytest.approx(inner([first], [both]), rel=0.15)


def test_a_sketch_is_right_on_average() -> None:
    vector = torch.tensor([1.0, -2.0, 3.0, 0.5])
    squares = [sketch([vector], 4, draw(seed)).square().sum().item() for seed in range(2000)]
    assert sum(squares) / len(squares) == pytest.approx(14.25, rel=0.05)
