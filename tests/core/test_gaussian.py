"""Gaussian noise against numbers that can be redone by hand, and against numerical accountants."""

from __future__ import annotations

import math
import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.core.errors import ConfigError
from fedfuse.core.gaussian import gaussian_delta, gaussian_epsilon, gaussian_noise_multiplier

MULTIPLIERS = st.floats(0.3, 30)
EPSILONS = st.floats(0.01, 30)
DELTAS = st.sampled_from([1e-9, 1e-6, 1e-5, 1e-3, 0.1])


def normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


@pytest.mark.parametrize(("multiplier", "epsilon"), [(1.0, 1.0), (2.0, 0.5), (0.7, 3.0)])
def test_delta_is_the_closed_form(multiplier: float, epsilon: float) -> None:
    half, rest = 1 / (2 * multiplier), epsilon * multiplier
    expected = normal_cdf(half - rest) - math.exp(epsilon) * normal_cdf(-half - rest)

    assert gaussian_delta(multiplier, epsilon) == pytest.approx(expected, rel=1e-9)


def test_delta_at_epsilon_zero_is_the_distance_of_the_two_bells() -> None:
    # Two normal distributions one deviation apart differ by 2 Phi(1/2) - 1 in total variation.
    assert gaussian_delta(1.0, 0.0) == pytest.approx(2 * normal_cdf(0.5) - 1)


@given(MULTIPLIERS, DELTAS)
def test_epsilon_and_delta_invert_each_other(multiplier: float, delta: float) -> None:
    epsilon = gaussian_epsilon(multiplier, delta)

    assert gaussian_delta(multiplier, epsilon) <= delta * (1 + 1e-6)
    if epsilon > 0:
        assert gaussian_delta(multiplier, epsilon) == pytest.approx(delta, rel=1e-4)


@given(EPSILONS, DELTAS, st.integers(1, 20))
def test_the_calibrated_noise_keeps_its_epsilon_and_not_much_more(epsilon: float, delta: float, releases: int) -> None:
    multiplier = gaussian_noise_multiplier(epsilon, delta, releases)

    spent = gaussian_epsilon(multiplier, delta, releases)
    assert spent <= epsilon * (1 + 1e-6)
    assert spent == pytest.approx(epsilon, rel=1e-3)


@given(MULTIPLIERS, st.integers(1, 50))
def test_releases_compose_like_one_with_less_noise(multiplier: float, releases: int) -> None:
    together = gaussian_epsilon(multiplier, 1e-5, releases)

    assert together == pytest.approx(gaussian_epsilon(multiplier / math.sqrt(releases), 1e-5), rel=1e-6)


@pytest.mark.parametrize(("multiplier", "releases"), [(1.0, 1), (2.0, 1), (4.0, 4), (5.0, 10)])
def test_numerical_accountants_agree(multiplier: float, releases: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        accountants = pytest.importorskip("opacus.accountants")
        rdp, prv = accountants.RDPAccountant(), accountants.PRVAccountant()
        for accountant in (rdp, prv):
            accountant.history = [(multiplier, 1.0, releases)]
        exact = gaussian_epsilon(multiplier, 1e-5, releases)

        # RDP is an upper bound that loses a little; PRV brackets the truth to its own tolerance.
        assert exact <= rdp.get_epsilon(delta=1e-5) <= 1.25 * exact
        assert prv.get_epsilon(delta=1e-5) == pytest.approx(exact, abs=0.05)


def test_the_limits() -> None:
    assert gaussian_epsilon(0.0, 1e-5) == math.inf
    assert gaussian_epsilon(1.0, 1e-5, num_releases=0) == 0.0
    assert gaussian_epsilon(100.0, 0.1) == 0.0


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 1e-5), (-1.0, 1e-5), (math.inf, 1e-5), (1.0, 0.0), (1.0, 1.0)])
def test_impossible_budgets_are_refused(epsilon: float, delta: float) -> None:
    with pytest.raises(ConfigError) as caught:
        gaussian_noise_multiplier(epsilon, delta)

    assert str(caught.value) == (
        f"no noise can be made for epsilon {epsilon:g} and delta {delta:g}\n"
        "  where: privacy\n"
        "  fix:   give an epsilon above 0 and a delta between 0 and 1"
    )
