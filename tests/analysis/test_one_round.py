"""The verdict on one round, from numbers that can be redone by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from fedfuse.analysis.one_round import diagnosis_of

# Two clients of equal size that each went 1 from a start of length 10, at right angles: the mean went the root of 1/2,
# and each client is that far from it.
HALF = 0.5**0.5
RUN: dict[str, Any] = {
    "clients": ["a", "b"],
    "shares": [0.5, 0.5],
    "num_parameters": 2,
    "start_length": 10.0,
    "update_lengths": [1.0, 1.0],
    "base_updates": None,
    "mean_length": HALF,
    "spread_lengths": [HALF, HALF],
    "cosines": [[1.0, 0.0], [0.0, 1.0]],
    "num_steps": [20, 40],
    "momentum": 0.0,
    "path_lengths": [2.0, 4.0],
    "curvatures": [3.0, -5.0],
    "have_settled": [True, True],
    "slopes_at_start": [3.0, 3.0],
    "slopes_at_own": [1.0, 1.0],
    "slopes_at_mean": [2.0, 2.0],
    "changes_to_start": [2.0, 4.0],
    "changes_to_mean": [1.0, 1.0],
    "pooled_change": 0.4,
    "pooled_slope": 1.0,
    "pooled_product": -0.3,
    "num_validation": 7,
    "lines": [
        {"from": "start", "to": "mean", "places": [0.0, 0.5, 1.0], "losses": [2.0, 1.8, 1.0]},
        {"from": "a", "to": "b", "places": [0.0, 0.5, 1.0], "losses": [1.4, 1.0, 1.2]},
    ],
}


def run(**others: Any) -> dict[str, Any]:
    return {**copy.deepcopy(RUN), **others}


def test_every_number_by_hand() -> None:
    found = diagnosis_of([RUN], 5)
    assert found.smoothness == 4.0
    assert found.largest_smoothness == 5.0
    assert found.update_size == 0.1
    assert found.num_steps == 30
    assert found.product == pytest.approx(4.0 * 0.1 * 30 * 2 * 10)
    assert found.step_bound == pytest.approx(3.0 * 4.0 * 2 * 1.0)
    assert found.bent_along_updates == 3.0
    assert (found.agreement, found.least_agreement) == (0.0, 0.0)
    # Each client's time is 2 * 1 / (3 + 1); half of it, times 1 - 1/5, times the pooled change.
    assert found.predicted_distance == pytest.approx(0.5 * 0.8 * 0.5 * 0.4)
    assert found.predicted_gap == pytest.approx(0.08 / HALF)
    assert (found.start_loss, found.mean_loss, found.progress) == (2.0, 1.0, 1.0)
    assert found.client_loss == pytest.approx(1.3)
    assert found.barrier == 0.0
    assert found.mean_barrier == pytest.approx(0.3)
    assert found.verdict == "enough"


def test_many_rounds_are_no_further_from_the_mean_than_the_clients() -> None:
    found = diagnosis_of([run(pooled_change=100.0)], 10)
    assert found.predicted_distance == pytest.approx(HALF)
    assert found.predicted_gap == pytest.approx(1.0)
    assert found.verdict == "not_enough"


def test_seeds_are_averaged_and_what_is_not_known_stays_unknown() -> None:
    found = diagnosis_of([RUN, run(start_length=5.0, path_lengths=[None, None])], 5)
    assert found.start_length == 7.5
    assert found.update_size == pytest.approx(0.15)
    assert found.step_bound == pytest.approx(24.0)
    assert diagnosis_of([run(path_lengths=[None, None])], 5).step_bound is None
    assert found.base_update_size is None
    assert diagnosis_of([run(base_updates=[0.1, 0.3])], 5).base_update_size == pytest.approx(0.2)


def test_one_client_has_nobody_to_agree_with() -> None:
    alone = run(
        clients=["a"],
        shares=[1.0],
        cosines=[[1.0]],
        spread_lengths=[0.0],
        lines=RUN["lines"][:1],
        **{key: RUN[key][:1] for key in ("update_lengths", "num_steps", "path_lengths", "curvatures", "have_settled")},
        **{key: RUN[key][:1] for key in ("slopes_at_start", "slopes_at_own", "changes_to_start")},
    )
    found = diagnosis_of([alone], 5)
    assert (found.agreement, found.least_agreement, found.barrier, found.client_loss) == (None, None, None, None)
    assert (found.predicted_distance, found.verdict) == (0.0, "enough")


@pytest.mark.parametrize(
    ("change", "verdict"), [(0.0, "enough"), (0.7, "enough"), (0.71, "open"), (1.7, "open"), (1.78, "not_enough")]
)
def test_the_gap_decides(change: float, verdict: str) -> None:
    # gap = 0.5 * 0.8 * 0.5 * change / 0.7071 = 0.2828 change
    assert diagnosis_of([run(pooled_change=change)], 5).verdict == verdict


def test_the_words_of_each_verdict() -> None:
    assert " ".join(diagnosis_of([RUN], 5).sentences()) == (
        "One round should be enough: 5 rounds of the same local work would end near the same model. "
        "The model of 5 rounds should lie 11 % as far from that of one round as one round went: up to 20 % is near, "
        "from 50 % on is far. "
        "Averaging brought the validation loss from 2 to 1."
    )
    assert diagnosis_of([run(pooled_change=1.0)], 5).sentences()[0] == (
        "One round may be enough: only a measurement tells (--measure)."
    )
    assert diagnosis_of([run(pooled_change=9.0)], 5).sentences()[0] == (
        "One round is not enough: expect 5 rounds of the same local work to do better."
    )


def test_a_mean_that_is_no_better_and_a_ridge_between_clients_are_told() -> None:
    downhill, between = copy.deepcopy(RUN["lines"])
    downhill["losses"] = [2.0, 2.0, 2.5]
    worse = diagnosis_of([run(lines=[downhill, between])], 5)
    assert worse.verdict == "not_enough"
    assert worse.sentences()[2] == "Averaging did not help at all: the validation loss went from 2 to 2.5."
    between["losses"] = [1.0, 1.4, 1.0]
    ridge = diagnosis_of([run(lines=[RUN["lines"][0], between])], 5)
    assert ridge.verdict == "not_enough"
    assert ridge.sentences()[2] == (
        "Averaging brought the validation loss from 2 to 1, but between two clients' models it rises by 0.4: they lie "
        "in different valleys."
    )


def test_what_weakens_the_verdict_is_said() -> None:
    downhill = {**RUN["lines"][0], "losses": [2.0, 1.95, 1.9]}
    found = diagnosis_of([run(lines=[downhill], momentum=0.9, have_settled=[True, False])], 10).sentences()
    # 30 steps: one round goes 10 (30 - 9 (1 - 0.9^30)) = 213.8, ten rounds ten times 1 + 1.9 + 2.71.
    assert " ".join(found[-3:]) == (
        "That is little: with more local work the answer may be another. "
        "Momentum starts anew in every round, so 10 rounds go about 26 % of the way in the same steps: part of any "
        "difference is that. "
        "The largest curvature had not settled at every client: L may be larger."
    )


def test_an_adaptive_optimizer_weakens_the_prediction() -> None:
    found = diagnosis_of([run(path_lengths=[None, None])], 5).sentences()
    assert found[-1] == "The optimizer adapts its steps, and starts anew in every round: the gap may well be larger."


def test_the_table_is_json_and_holds_everything() -> None:
    import json

    table = json.loads(json.dumps(diagnosis_of([RUN], 5).to_json()))
    assert table["verdict"] == "enough"
    assert table["predicted_gap"] == pytest.approx(0.08 / HALF)
    assert len(table["sentences"]) == 3
