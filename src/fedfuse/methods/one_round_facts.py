"""What the server makes of the measurements for one round: lengths, angles, sums of sketches, points on lines."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.cohort import Replies
from fedfuse.core.payload import Value
from fedfuse.methods.rounds import first_weights
from fedfuse.methods.tasks import example_weights
from fedfuse.ops.lora import norm
from fedfuse.ops.smoothness import inner, length
from fedfuse.rules.reading import Upload
from fedfuse.training import LocalSGD, step_rates

State = Mapping[str, Tensor]

START, MEAN = "start", "mean"
_LORA = ".lora_A.default.weight"
_PART_BYTES = 64 << 20


def point_between(start: State, anchors: Sequence[State], shares: Sequence[float]) -> dict[str, Tensor]:
    """Weights that are some of the way from the first weights to each of several models.

    Args:
        start: the first weights.
        anchors: states of the same shapes, at least one.
        shares: one per anchor; 1 for one of them alone is that model.

    Returns:
        A state; what is no floating-point tensor comes from the first anchor.

    Example:
        >>> start, ends = {"w": torch.tensor([1.0])}, [{"w": torch.tensor([3.0])}, {"w": torch.tensor([5.0])}]
        >>> point_between(start, ends, [0.5, 0.25])["w"]
        tensor([3.])
    """
    point = {}
    for name, first in start.items():
        if not first.is_floating_point():
            point[name] = anchors[0][name]
            continue
        moved = first.double()
        for anchor, share in zip(anchors, shares, strict=True):
            if share:
                moved = moved + share * (anchor[name].double() - first.double())
        point[name] = moved.to(first.dtype)
    return point


def line_points(names: Sequence[str], num_points: int) -> tuple[list[list[float]], list[dict[str, Any]]]:
    """The points on the line from the start to the mean and on the lines between clients, each point once.

    Args:
        names: of the anchors; the first is the mean.
        num_points: on each line, its ends included.

    Returns:
        Shares of the anchors for each point, and the lines: ``from``, ``to``, ``places`` in [0, 1] and ``rows``.

    Example:
        >>> rows, lines = line_points(["mean", "a", "b"], 3)
        >>> rows
        [[0.0, 0.0, 0.0], [0.5, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]]
        >>> [(line["from"], line["to"], line["rows"]) for line in lines]
        [('start', 'mean', [0, 1, 2]), ('a', 'b', [3, 4, 5])]
    """
    places = [index / (num_points - 1) for index in range(num_points)]
    ends = {START: [0.0] * len(names)}
    for index, name in enumerate(names):
        ends[name] = [float(index == other) for other in range(len(names))]
    known: dict[tuple[float, ...], int] = {}
    lines = []
    for first, second in [(START, MEAN), *itertools.combinations(names[1:], 2)]:
        rows = []
        for place in places:
            point = tuple((1 - place) * a + place * b for a, b in zip(ends[first], ends[second], strict=True))
            rows.append(known.setdefault(point, len(known)))
        lines.append({"from": first, "to": second, "places": places, "rows": rows})
    return [list(point) for point in known], lines


def update_facts(
    models: Replies, asked: Sequence[str], spec: ModelSpec, mean: State, local: LocalSGD
) -> dict[str, Any]:
    """How far and in which directions the clients went, over all that is trained.

    Args:
        models: uploads with ``model/*`` and ``num_examples``.
        asked: the clients that are looked at.
        spec: the common model.
        mean: the averaged model.
        local: how clients train.

    Returns:
        JSON; lists are in the order of ``asked``.
    """
    start = first_weights(spec)
    names = [name for name, parameter in spec.build().named_parameters() if parameter.requires_grad]
    known = dict(zip(models, models.uploads(), strict=True))
    products = update_products([known[client_id] for client_id in asked], mean, start, names)
    squares = products.diagonal()
    lengths = squares.clamp(min=0).sqrt()
    bounds = (lengths[:-1, None] * lengths[None, :-1]).clamp(min=torch.finfo(torch.float64).tiny)
    # How far each client is from the mean follows from the inner products.
    spread = (squares[:-1] - 2 * products[:-1, -1] + squares[-1]).clamp(min=0).sqrt()
    counts = [int(count) for client_id, count in models.numbers("num_examples").items() if client_id in set(asked)]
    rates = [step_rates(local, count, local.num_epochs) for count in counts]
    # With momentum every step is felt 1 / (1 - momentum) times; an adaptive step has no such length.
    reach = 1 / (1 - local.momentum) if local.optimizer == "sgd" else math.nan
    return {
        "clients": list(asked),
        "shares": [count / sum(counts) for count in counts],
        "num_parameters": sum(start[name].numel() for name in names),
        "start_length": length([start[name] for name in names]),
        "update_lengths": lengths[:-1].tolist(),
        "base_updates": base_updates(spec, (models[client_id].group("model") for client_id in asked)),
        "mean_length": float(lengths[-1]),
        "spread_lengths": spread.tolist(),
        "cosines": (products[:-1, :-1] / bounds).clamp(-1, 1).tolist(),
        "num_steps": [len(each) for each in rates],
        "momentum": local.momentum if local.optimizer == "sgd" else 0.0,
        "path_lengths": [None if math.isnan(reach) else reach * sum(each) for each in rates],
    }


def update_products(uploads: Sequence[Mapping[str, Value]], mean: State, start: State, names: Sequence[str]) -> Tensor:
    """Inner products of the clients' updates and the mean's, read part by part.

    Args:
        uploads: with ``model/*``.
        mean: the averaged model.
        start: the first weights.
        names: of what is looked at.

    Returns:
        Shape ``(num_clients + 1, num_clients + 1)``, float64; the mean is last.
    """
    sources, size = [Upload(upload) for upload in uploads], len(uploads) + 1
    products = torch.zeros(size, size, dtype=torch.float64)
    step = max(1, _PART_BYTES // (8 * size))
    for name in names:
        first, last = start[name].reshape(-1), mean[name].reshape(-1)
        for begin in range(0, len(first), step):
            origin = first[begin : begin + step]
            part = torch.empty_like(origin)
            rows = torch.empty(size, len(origin), dtype=torch.float64)
            for row, source in zip(rows, sources, strict=False):
                row.copy_(source.read(f"model/{name}", begin, part))
            rows[-1].copy_(last[begin : begin + step])
            rows -= origin.double()
            products += rows @ rows.T
    return products


def base_updates(spec: ModelSpec, states: Iterable[State]) -> list[float] | None:
    """How large LoRA's changes are beside the weights of the base that they are added to.

    Args:
        spec: the common model.
        states: of the clients' models.

    Returns:
        One ratio of lengths per client, over all weights with an adapter; ``None`` where the model has none.
    """
    module = spec.build()
    if not any(key.endswith(_LORA) for key in module.state_dict()):
        return None
    from fedfuse.models.foundation.foundation import Foundation
    from fedfuse.models.foundation.lora import lora_layout

    assert isinstance(module, Foundation)
    layout = lora_layout(spec)
    base = length([module.weight_of(name).detach() for name in layout.modules])
    changes = (sum(norm(change) ** 2 for change in layout.factors(state).values()) for state in states)
    return [change**0.5 / base for change in changes]


def slope_facts(models: Replies, answers: Replies) -> dict[str, Any]:
    """What the clients measured of their losses, and the sums of their sketches.

    Args:
        models: uploads with ``num_examples``.
        answers: uploads of the task ``slopes``.
    """
    weights = dict(zip(models, example_weights(models), strict=True))
    total = sum(weights[client_id] for client_id in answers)
    change = torch.zeros((), dtype=torch.float64)
    downhill = torch.zeros((), dtype=torch.float64)
    rows: dict[str, list[Any]] = {}
    for client_id in answers:
        upload = answers[client_id]
        for key, name in _NUMBERS.items():
            rows.setdefault(name, []).append(upload[key])
        share = weights[client_id] / total
        change = change + share * upload.tensor("sketch/change").double()
        downhill = downhill + share * upload.tensor("sketch/slope").double()
    return {
        **rows,
        "pooled_change": length([change]),
        "pooled_slope": length([downhill]),
        "pooled_product": inner([change], [downhill]),
    }


_NUMBERS = {
    "curvature": "curvatures",
    "has_settled": "have_settled",
    "slope/start": "slopes_at_start",
    "slope/own": "slopes_at_own",
    "slope/mean": "slopes_at_mean",
    "change/start": "changes_to_start",
    "change/mean": "changes_to_mean",
}
