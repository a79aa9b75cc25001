"""Whether one round of averaging is enough, from what was measured after it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

Verdict = Literal["enough", "open", "not_enough"]

# Chosen on runs of handwritten digits: docs/guides/one-round.md says which, and how often they were right.
NEAR = 0.2
FAR = 0.5
BARRIER = 0.1
LITTLE = 0.1
_SAME_WORK = 0.9


@dataclass(frozen=True)
class Diagnosis:
    """What tells whether one round is enough. Lengths are those of all that is trained; losses are on validation parts.

    Args:
        num_clients: m, clients that were measured.
        num_rounds: T, the rounds that one round is held against.
        num_parameters: numbers that are trained.
        num_steps: T k, local steps of a client in all, mean over clients.
        smoothness: L, the size of the largest curvature of a client's loss at the first weights, mean over clients.
        largest_smoothness: the same of the client with the largest.
        share_settled: share of the clients whose power iteration settled; where one did not, its L is too small.
        bent_along_updates: change of slope from the first weights to the client's model over the distance: the
            smoothness that local training met.
        start_length: length of the first weights.
        update_size: tau, length of a client's update over that of the first weights, mean over clients.
        largest_update_size: the same of the client that went furthest.
        base_update_size: for LoRA, length of the change of the weights over that of the base weights that it is added
            to, mean over clients; ``None`` for other models.
        agreement: mean cosine between the updates of two clients; ``None`` for one client.
        least_agreement: smallest cosine.
        mean_length: how far the mean is from the first weights.
        spread_length: how far a client is from the mean, weighted by examples.
        product: the bound of Wang et al., L tau T k m |w0|, with T k in steps.
        step_bound: a bound with its constants: the sum of the learning rates (over 1 - momentum) times L times twice
            the length of an update; ``None`` for optimizers whose steps have no such length.
        work_of_many: how far T rounds go in the same steps, as a share of how far one round goes, on a slope that stays
            as it is: momentum starts anew in every round.
        predicted_distance: how far the model of T rounds should be from that of one round.
        start_loss: at the first weights.
        mean_loss: at the mean.
        client_loss: of a client's model on all clients' validation parts, mean over those that were looked at; ``None``
            where none were.
        barrier: largest rise of the loss above the straight line between two clients' models, mean over pairs; ``None``
            where there is no pair.
        mean_barrier: the same on the line from the first weights to the mean.
    """

    num_clients: float
    num_rounds: float
    num_parameters: float
    num_steps: float
    smoothness: float
    largest_smoothness: float
    share_settled: float
    bent_along_updates: float
    start_length: float
    update_size: float
    largest_update_size: float
    base_update_size: float | None
    agreement: float | None
    least_agreement: float | None
    mean_length: float
    spread_length: float
    product: float
    step_bound: float | None
    work_of_many: float
    predicted_distance: float
    start_loss: float
    mean_loss: float
    client_loss: float | None
    barrier: float | None
    mean_barrier: float

    @property
    def predicted_gap(self) -> float:
        """How far T rounds should end from one round, as a share of how far one round went."""
        return self.predicted_distance / self.mean_length if self.mean_length > 0 else 0.0

    @property
    def progress(self) -> float:
        """How much the mean lowered the loss."""
        return self.start_loss - self.mean_loss

    @property
    def verdict(self) -> Verdict:
        """Whether one round is enough, by the three thresholds of this module."""
        if self.progress <= 0 or self._has_ridge or self.predicted_gap >= FAR:
            return "not_enough"
        return "enough" if self.predicted_gap <= NEAR else "open"

    @property
    def _has_ridge(self) -> bool:
        return (self.barrier or 0.0) > BARRIER * self.progress

    def sentences(self) -> list[str]:
        """The verdict and its reasons in plain words.

        Returns:
            The verdict first.
        """
        rounds = f"{self.num_rounds:g} rounds"
        found = {
            "enough": [f"One round should be enough: {rounds} of the same local work would end near the same model."],
            "open": ["One round may be enough: only a measurement tells (--measure)."],
            "not_enough": [f"One round is not enough: expect {rounds} of the same local work to do better."],
        }[self.verdict]
        found.append(
            f"The model of {rounds} should lie {100 * self.predicted_gap:.0f} % as far from that of one round as one "
            f"round went: up to {100 * NEAR:.0f} % is near, from {100 * FAR:.0f} % on is far."
        )
        losses = f"from {self.start_loss:.3g} to {self.mean_loss:.3g}"
        if self.progress <= 0:
            found.append(f"Averaging did not help at all: the validation loss went {losses}.")
        elif self._has_ridge:
            found.append(
                f"Averaging brought the validation loss {losses}, but between two clients' models it rises by "
                f"{self.barrier:.3g}: they lie in different valleys."
            )
        else:
            found.append(f"Averaging brought the validation loss {losses}.")
            if self.progress < LITTLE * self.start_loss:
                found.append("That is little: with more local work the answer may be another.")
        if self.work_of_many < _SAME_WORK:
            found.append(
                f"Momentum starts anew in every round, so {rounds} go about {100 * self.work_of_many:.0f} % of the way "
                "in the same steps: part of any difference is that."
            )
        if self.step_bound is None:
            found.append("The optimizer adapts its steps, and starts anew in every round: the gap may well be larger.")
        if self.share_settled < 1:
            found.append("The largest curvature had not settled at every client: L may be larger.")
        return found

    def to_json(self) -> dict[str, Any]:
        """All numbers, the verdict and its words, as a table."""
        return {
            **asdict(self),
            "predicted_gap": self.predicted_gap,
            "progress": self.progress,
            "verdict": self.verdict,
            "sentences": self.sentences(),
        }


def diagnosis_of(runs: Sequence[Mapping[str, Any]], num_rounds: int) -> Diagnosis:
    """Put the measurements of one setting together.

    Args:
        runs: what the method ``one_round_probe`` reports, for each seed; at least one.
        num_rounds: T, the rounds that one round is held against, at least 1.

    Returns:
        Means over seeds.
    """
    found = [_of_one(run, num_rounds) for run in runs]
    means: dict[str, Any] = {}
    for entry in fields(Diagnosis):
        values = [getattr(one, entry.name) for one in found]
        known = [value for value in values if value is not None]
        means[entry.name] = statistics.fmean(known) if known else None
    return Diagnosis(**means)


def barrier(losses: Sequence[float], places: Sequence[float]) -> float:
    """How far a loss rises above the straight line between its ends.

    Args:
        losses: along the line, ends included.
        places: where on the line, from 0 to 1.

    Returns:
        At least 0.

    Example:
        >>> barrier([1.0, 3.5, 2.0], [0.0, 0.5, 1.0]), barrier([1.0, 1.2, 2.0], [0.0, 0.5, 1.0])
        (2.0, 0.0)
    """
    straight = [(1 - place) * losses[0] + place * losses[-1] for place in places]
    return max(0.0, *(loss - level for loss, level in zip(losses, straight, strict=True)))


def work_of_many(num_steps: float, num_rounds: int, momentum: float) -> float:
    """How far T rounds go on a constant slope, over how far one round goes in the same steps.

    Args:
        num_steps: of one client in all, above 0.
        num_rounds: T.
        momentum: in [0, 1); it starts anew in every round.

    Returns:
        In (0, 1]; 1 without momentum.

    Example:
        >>> work_of_many(2, 2, 0.5)  # one round goes 1 + 1.5, two rounds 1 + 1
        0.8
    """

    def way(steps: float) -> float:
        start: float = momentum * (1 - momentum**steps) / (1 - momentum)
        return (steps - start) / (1 - momentum)

    return num_rounds * way(num_steps / num_rounds) / way(num_steps)


def _of_one(run: Mapping[str, Any], num_rounds: int) -> Diagnosis:
    shares: Sequence[float] = run["shares"]

    def weighted(name: str) -> float:
        return float(sum(share * value for share, value in zip(shares, run[name], strict=True)))

    sizes = [length / run["start_length"] if run["start_length"] > 0 else 0.0 for length in run["update_lengths"]]
    curvatures = [abs(value) for value in run["curvatures"]]
    cosines = [value for row, line in enumerate(run["cosines"]) for value in line[:row]]
    downhill, between = run["lines"][0], run["lines"][1:]
    ends = {line[end]: line["losses"][at] for line in between for end, at in (("from", 0), ("to", -1))}
    smoothness, size = statistics.fmean(curvatures), statistics.fmean(sizes)
    num_steps, num_clients = statistics.fmean(run["num_steps"]), len(shares)
    paths = [path for path in run["path_lengths"] if path is not None]
    update_length = statistics.fmean(run["update_lengths"])
    return Diagnosis(
        num_clients=num_clients,
        num_rounds=num_rounds,
        num_parameters=run["num_parameters"],
        num_steps=num_steps,
        smoothness=smoothness,
        largest_smoothness=max(curvatures),
        share_settled=statistics.fmean(run["have_settled"]),
        bent_along_updates=weighted("changes_to_start") / max(weighted("update_lengths"), 1e-300),
        start_length=run["start_length"],
        update_size=size,
        largest_update_size=max(sizes),
        base_update_size=None if run["base_updates"] is None else statistics.fmean(run["base_updates"]),
        agreement=statistics.fmean(cosines) if cosines else None,
        least_agreement=min(cosines, default=None),
        mean_length=run["mean_length"],
        spread_length=weighted("spread_lengths"),
        product=smoothness * size * num_steps * num_clients * run["start_length"],
        step_bound=statistics.fmean(paths) * smoothness * 2 * update_length if paths else None,
        work_of_many=work_of_many(num_steps, num_rounds, run["momentum"]),
        predicted_distance=_predicted_distance(run, num_rounds),
        start_loss=downhill["losses"][0],
        mean_loss=downhill["losses"][-1],
        client_loss=statistics.fmean(ends.values()) if ends else None,
        barrier=statistics.fmean(barrier(line["losses"], line["places"]) for line in between) if between else None,
        mean_barrier=barrier(downhill["losses"], downhill["places"]),
    )


def _predicted_distance(run: Mapping[str, Any], num_rounds: int) -> float:
    """How far the model of T rounds should be from that of one round.

    To second order in the time t that gradient flow runs, the two differ by ``t / 2 (1 - 1 / T)`` times the clients'
    mean of what the slope changes from the mean model to the client's own. The time is how far a client went over the
    mean size of its slope at both ends, so it is that of any optimizer, and it ends where a client has converged.
    Nothing draws the model of many rounds further from the mean than the clients are.
    """
    time, reach = 0.0, 0.0
    ends = zip(run["shares"], run["update_lengths"], run["slopes_at_start"], run["slopes_at_own"], strict=True)
    for share, length, first, last in ends:
        time += share * 2 * length / max(first + last, 1e-300)
    for share, length in zip(run["shares"], run["spread_lengths"], strict=True):
        reach += share * length
    predicted = 0.5 * (1 - 1 / num_rounds) * time * float(run["pooled_change"])
    return min(predicted, reach)
