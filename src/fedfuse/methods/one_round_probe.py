"""What tells beforehand whether one round of averaging is enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.artifact import Artifact, load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort, Replies
from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import Examples
from fedfuse.core.expecting import Expectation, TensorSpec
from fedfuse.core.judging import HasObjective
from fedfuse.core.method import Fused, Job, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.core.seeding import Rng
from fedfuse.methods.fedavg import average, check_homogeneous
from fedfuse.methods.one_round_facts import MEAN, START, line_points, point_between, slope_facts, update_facts
from fedfuse.methods.rounds import first_weights
from fedfuse.methods.tasks import LocalTraining
from fedfuse.ops.smoothness import largest_curvature, length, sketch, slope
from fedfuse.training import evaluate

OWN = "own"
_BATCHNORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_BATCH = 64
_SETTLED = 0.02


@register_method("one_round_probe", paper="https://arxiv.org/abs/2412.04650", reference="Wang et al., 2024")
@dataclass(frozen=True, kw_only=True)
class OneRoundProbe(LocalTraining):
    """One round of averaging, and measurements that tell whether more rounds would do better.

    After Wang et al., "Revisiting Federated Fine-Tuning: A Single Communication Round is Enough for Foundation Models",
    arXiv:2412.04650: the gap between one round and many at equal local work is bounded by the smoothness of the loss,
    the size of the updates, the length of local training and the number of clients. The model that comes out is that of
    FedAvg with one round; the measurements are facts of the run. ``fedfuse diagnose`` runs it and puts them into words.

    Exchanges: ``local_models``, the question that every one-round method asks. ``slopes``: every client gets its own
    model back and the mean, and uploads a few numbers on how its loss bends, with two short sketches of slopes.
    ``lines``: every client gets the mean and ``num_anchors`` of the models, and uploads its validation loss at points
    on the lines between them.

    Departures: L is measured per client and averaged, which is never less than that of the clients' mean loss: power
    iteration on the mean loss itself would move a vector of the model's size up and down in every step. The sketches,
    and what is predicted from them, are ours.

    Args:
        local: how clients train.
        num_probed: most training examples that slopes are measured on, at least 1.
        num_curved: most of these that the curvature is measured on, 1 to 64: each of its steps costs two passes.
        num_iterations: most steps of the power iteration, at least 1; it ends when a step changes it by less than 2 %.
        num_anchors: clients whose models are shown to all for the lines between them; 0 shows nobody's.
        num_points: points on each line, its ends included, at least 3.
        sketch_size: numbers in a sketch, at least 1; lengths are right to about the root of ``2 / sketch_size``.
    """

    takes_heterogeneous: ClassVar[bool] = False

    num_probed: int = 256
    num_curved: int = 64
    num_iterations: int = 20
    num_anchors: int = 3
    num_points: int = 5
    sketch_size: int = 1024

    def __post_init__(self) -> None:
        least = {
            "num_probed": 1,
            "num_curved": 1,
            "num_iterations": 1,
            "num_anchors": 0,
            "num_points": 3,
            "sketch_size": 1,
        }
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}", where=f"method.{name}", fix=f"give at least {lowest}"
                )
        if self.num_curved > _BATCH:
            raise ConfigError(
                f"num_curved is {self.num_curved}", where="method.num_curved", fix=f"give at most {_BATCH}"
            )

    @client_task(
        uploads={
            "curvature": "largest curvature of the loss at the first weights",
            "has_settled": "whether the power iteration settled",
            "slope/*": "length of the loss's slope at the first weights, at the client's model and at the mean",
            "change/*": "length of the change of slope from the client's model to the first weights and to the mean",
            "sketch/*": "short random sketches of that change to the mean, and of the slope at the mean",
        },
        settings=("num_probed", "num_curved", "num_iterations", "sketch_size"),
    )
    def slopes(self, client: Client, msg: Payload) -> Payload:
        """Measure how the client's loss bends at the first weights, at its own model and at the mean.

        Args:
            client: the client.
            msg: ``model/*``, its own trained model, and ``mean/*``.
        """
        module = client.model.build().to(client.device)
        set_probing(module)
        train = client.data.train
        rows = torch.randperm(len(train), generator=client.rng.torch("probed"))[: self.num_probed]
        # Normalisation by the batch needs two examples.
        parts = _batches(rows if len(rows) > 1 else rows.repeat(2))
        parameters = [p for p in module.parameters() if p.requires_grad]

        def loss(part: Tensor) -> Tensor:
            batch = train.subset(part)
            with client.rng.ambient("loss"):
                return batch_loss(module, batch.x.to(client.device), batch.y.to(client.device))

        def whole_slope() -> list[Tensor]:
            total = [torch.zeros_like(parameter) for parameter in parameters]
            for part in parts:
                share = len(part) / sum(map(len, parts))
                total = added(total, slope(partial(loss, part), parameters), share)
            return total

        found: dict[str, list[Tensor]] = {START: whole_slope()}
        client.progress(1, 4)
        curvature = largest_curvature(
            partial(loss, parts[0][: max(2, self.num_curved)]),
            parameters,
            generator=client.rng.torch("direction"),
            num_steps=self.num_iterations,
            tolerance=_SETTLED,
        )
        client.progress(2, 4)
        for place, group in ((OWN, "model"), (MEAN, "mean")):
            load_state(module, msg.group(group))
            found[place] = whole_slope()
            client.progress(3 if place == OWN else 4, 4)
        to_start, to_mean = (added(found[OWN], found[place], -1.0) for place in (START, MEAN))
        # The same places and signs for all clients, so that the server can add sketches.
        short = {
            name: sketch(vector, self.sketch_size, Rng(client.model.seed).torch("sketch"))
            for name, vector in (("change", to_mean), ("slope", found[MEAN]))
        }
        upload = Payload({"curvature": curvature.value, "has_settled": curvature.has_settled})
        for place, vector in found.items():
            upload[f"slope/{place}"] = length(vector)
        upload["change/start"], upload["change/mean"] = length(to_start), length(to_mean)
        return upload.put_group("sketch", short)

    @client_task(
        uploads={
            "losses": "mean validation loss at each point",
            "num_validation": "number of validation examples",
        },
        settings=(),
    )
    def line_losses(self, client: Client, msg: Payload) -> Payload:
        """Measure the validation loss at points that are sums of the anchors.

        Args:
            client: the client.
            msg: ``anchor_0/*``, ``anchor_1/*``, ... and ``points``, shape ``(num_points, num_anchors)``: how much of
                the way from the first weights to each anchor.
        """
        module = client.model.build()
        start, points, held = first_weights(client.model), msg.tensor("points"), client.data.validation
        anchors = [msg.group(f"anchor_{index}") for index in range(points.shape[1])]
        losses = torch.zeros(len(points), dtype=torch.float64)
        for row, point in enumerate(points.tolist() if len(held) else []):
            load_state(module, point_between(start, anchors, point))
            losses[row] = mean_loss(module, held, client)
            client.progress(row + 1, len(points))
        return Payload({"losses": losses, "num_validation": len(held)})

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Average, then measure.

        Args:
            cohort: the clients.
            job: the common model.
        """
        check_homogeneous(job)
        models = self.local_models(cohort, job)
        mean = average(models, job)
        answers = self._ask_slopes(cohort, models, mean)
        job.facts["one_round"] = {
            **update_facts(models, list(answers), job.model, mean.state, self.local),
            **slope_facts(models, answers),
            **self._line_facts(cohort, models, mean),
        }
        return Fused(model=mean)

    def _ask_slopes(self, cohort: Cohort, models: Replies, mean: Artifact) -> Replies:
        messages = {
            c: Payload().put_group("model", models[c].group("model")).put_group("mean", mean.state) for c in models
        }
        vector = TensorSpec((self.sketch_size,))
        expect: Expectation = {
            "curvature": float,
            "has_settled": bool,
            **{f"slope/{place}": float for place in (START, OWN, MEAN)},
            **{f"change/{place}": float for place in (START, MEAN)},
            "sketch/change": vector,
            "sketch/slope": vector,
        }
        return cohort.ask(self.slopes, messages, key="slopes", expect=expect)

    def _line_facts(self, cohort: Cohort, models: Replies, mean: Artifact) -> dict[str, Any]:
        """Losses on all clients' validation parts, along the lines."""
        known = list(models)
        chosen = torch.linspace(0, len(known) - 1, min(self.num_anchors, len(known))).round().long().tolist()
        names = [MEAN, *(known[index] for index in chosen)]
        rows, lines = line_points(names, self.num_points)
        message = Payload({"points": torch.tensor(rows, dtype=torch.float64)})
        message.put_group("anchor_0", dict(mean.state))
        for index, name in enumerate(names[1:], start=1):
            message.put_group(f"anchor_{index}", models[name].group("model"))
        expect = {"losses": TensorSpec((len(rows),), torch.float64), "num_validation": int}
        replies = cohort.ask(self.line_losses, message, key="lines", expect=expect)
        weights = torch.tensor(list(replies.numbers("num_validation").values()), dtype=torch.float64)
        if weights.min() < 0 or weights.sum() <= 0:
            raise DataError(
                "no client has validation examples to measure a loss on",
                where="data.validation_fraction",
                fix="set apart a part of each client's data, such as 0.1",
            )
        table = torch.stack([replies[c].tensor("losses") for c in replies])
        pooled = (weights @ table / weights.sum()).tolist()
        return {
            "num_validation": int(weights.sum()),
            "lines": [{**line, "losses": [pooled[row] for row in line["rows"]]} for line in lines],
        }


def set_probing(module: nn.Module) -> None:
    """Bring a module into the mode that slopes are measured in: the loss that is trained, without its chance.

    Args:
        module: without dropout afterwards; normalisation by the batch stays as in training.
    """
    module.eval()
    for layer in module.modules():
        if isinstance(layer, _BATCHNORM):
            layer.train()


def batch_loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The loss that local training lowers.

    Args:
        module: a classifier, or one that knows its own objective.
        x: inputs, shape ``(n, *input_shape)``.
        y: labels, shape ``(n,)``.

    Returns:
        A scalar.
    """
    if isinstance(module, HasObjective):
        return module.objective(x, y)
    logits = module(x)
    return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), y)


def mean_loss(module: nn.Module, examples: Examples, client: Client) -> float:
    """The mean loss on some examples, in evaluation mode.

    Args:
        module: a classifier, or one that knows its own objective.
        examples: at least one.
        client: says where, and seeds what an objective draws: the same for every model.
    """
    if not isinstance(module, HasObjective):
        return evaluate(module, examples, device=client.device).loss
    module.to(client.device).eval()
    total = 0.0
    with torch.no_grad(), client.rng.ambient("validation"):
        for rows in torch.arange(len(examples)).split(_BATCH):
            part = examples.subset(rows)
            total += len(rows) * float(module.objective(part.x.to(client.device), part.y.to(client.device)))
    return total / len(examples)


def added(first: Sequence[Tensor], second: Sequence[Tensor], factor: float) -> list[Tensor]:
    """One vector and a multiple of another, both in pieces.

    Args:
        first: pieces.
        second: pieces of the same shapes.
        factor: what the second is multiplied by.
    """
    return [a + factor * b for a, b in zip(first, second, strict=True)]


def _batches(rows: Tensor) -> list[Tensor]:
    """Nearly equal parts, so that none is too small for normalisation by the batch."""
    return list(rows.tensor_split(-(-len(rows) // _BATCH)))
