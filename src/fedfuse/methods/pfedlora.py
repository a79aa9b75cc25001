"""Clients with models of their own that exchange a small common adapter."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.artifact import Artifact, ModelSpec, detached_state, load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort, Replies
from fedfuse.core.errors import ConfigError
from fedfuse.core.judging import HasObjective
from fedfuse.core.method import Fused, Job, Method, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.sizes import State, described, received
from fedfuse.methods.tasks import example_weights
from fedfuse.models.ensemble import Ensemble
from fedfuse.models.small import InputKind, small_recipe
from fedfuse.rules import fuse_uploads
from fedfuse.rules.mean import Mean
from fedfuse.training import LocalSGD, train

ADAPTER_UPLOADS = {
    "adapter/*": "weights of the small adapter, after training",
    "num_examples": "number of training examples",
    "curve/*": "training loss and validation scores per epoch",
}
OWN_UPLOADS = {
    "own/*": "the client's own model, with collect: true only",
    "num_examples": "number of training examples",
}


@register_method("pfedlora", paper="https://arxiv.org/abs/2310.13283", reference="Yi et al., arXiv 2023")
@dataclass(frozen=True, kw_only=True)
class PFedLoRA(Method):
    """Every client trains its own model and a small adapter in turn; only the adapter travels and is averaged.

    Yi et al., arXiv 2310.13283: the adapter is the same small network with a low-rank head at every client, beside a
    model of any architecture. First the adapter as it came is frozen and the own model is trained, then the own model
    is frozen and the adapter is trained.

    Exchanges: ``num_rounds``, each uploads the adapter; and ``finish``, which brings the last adapter, and with
    ``collect`` uploads the own model, so that a simulation can score it.

    Departures: what is trained is the cross-entropy of the weighted mean of the two answers, where the paper adds up
    the two losses: there, what is frozen has no effect on what is trained unless both share a head. That mean is also
    the client's final model. The paper's adapter is for images; ours takes vectors and tokens as well. Of a round's
    epochs the own model gets the larger half, the adapter the rest.

    Args:
        local: how clients train; ``local.num_epochs`` is the total over all rounds and both halves, at least 2 per
            round; without ``patience``.
        num_rounds: rounds, at least 1.
        adapter_weight: weight of the adapter's answer, mu in the paper, in (0, 1).
        width: channels or units of the adapter's first layer, at least 1.
        rank: of its head, at least 1.
        num_buckets: embeddings of an adapter for tokens, at least 1.
        inputs: what the adapter takes; ``auto`` finds out.
        collect: whether clients upload their own models at the end; without it nobody but they has them.
    """

    local: LocalSGD = field(default_factory=LocalSGD)
    num_rounds: int = 1
    adapter_weight: float = 0.3
    width: int = 16
    rank: int = 8
    num_buckets: int = 2048
    inputs: Literal["auto", "image", "vector", "tokens"] = "auto"
    collect: bool = True

    def __post_init__(self) -> None:
        for name in ("num_rounds", "width", "rank", "num_buckets"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", where=f"method.{name}", fix="give at least 1")
        if not 0 < self.adapter_weight < 1:
            raise ConfigError(
                f"adapter_weight is {self.adapter_weight}",
                where="method.adapter_weight",
                fix="give a number between 0 and 1",
            )
        if self.local.patience is not None:
            raise ConfigError(
                "pfedlora trains two models in turn, and neither is judged alone",
                where="method.local.patience",
                fix="leave patience out",
            )
        if self.local.num_epochs < 2 * self.num_rounds:
            raise ConfigError(
                f"{self.local.num_epochs} local epochs cannot be divided over model and adapter in each round",
                where="method.local.num_epochs",
                fix=f"give at least {2 * self.num_rounds}",
            )

    @client_task(uploads=ADAPTER_UPLOADS, settings=("local", "adapter_weight"), state=True)
    def train_in_turn(self, client: Client, msg: Payload) -> Payload:
        """Train the own model beside the frozen adapter, then the adapter beside the frozen model.

        Args:
            client: the client; its state holds its model.
            msg: ``recipe`` and ``seed`` of the adapter, ``adapter/*`` to start from after the first round, and
                ``num_epochs``.
        """
        own, adapter = own_model(client), received(client, msg).build()
        start = msg.group("adapter")
        if start:
            load_state(adapter, start)
        num_epochs = int(msg.number("num_epochs"))
        curves: dict[str, Tensor] = {}
        for name, part, other, weight, share in (
            ("own", own, adapter, 1 - self.adapter_weight, num_epochs - num_epochs // 2),
            ("adapter", adapter, own, self.adapter_weight, num_epochs // 2),
        ):
            found = train(
                part,
                client.data.train,
                self.local,
                rng=client.rng.child(name),
                device=client.device,
                num_epochs=share,
                augment=client.data.augment,
                loss=beside(other.to(client.device), weight),
                progress=client.progress,
            )
            curves |= {f"{name}_{key}": values for key, values in found.items()}
            other.to("cpu")
        client.state.put_group("own", detached_state(own))
        upload = Payload({"num_examples": len(client.data.train)})
        return upload.put_group("adapter", detached_state(adapter)).put_group("curve", curves)

    @client_task(uploads=OWN_UPLOADS, settings=("collect",), state=True)
    def finish(self, client: Client, msg: Payload) -> Payload:
        """Keep the last adapter beside the own model.

        Args:
            client: the client; its state holds its model.
            msg: ``recipe`` and ``seed`` of the adapter, and ``adapter/*``.
        """
        client.state.put_group("adapter", msg.group("adapter"))
        upload = Payload({"num_examples": len(client.data.train)})
        return upload.put_group("own", detached_state(own_model(client))) if self.collect else upload

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Send the adapter, let clients train in turn, average the adapters, and again.

        Args:
            cohort: the clients.
            job: says which model each client owns.
        """
        adapter = self.adapter(job)
        state: State = {}
        first = {f"adapter/{name}": tensor for name, tensor in adapter.build().state_dict().items()}
        for number in range(self.num_rounds):
            message = described(adapter).put_group("adapter", state)
            message["num_epochs"] = self.local.share(number, self.num_rounds)
            replies = cohort.ask(
                self.train_in_turn, message, key=f"round_{number}", expect={**first, "num_examples": int}
            )
            state = fuse_uploads(replies.uploads(), Mean(), example_weights(replies), group="adapter")
        job.facts["adapter_values"] = sum(tensor.numel() for tensor in state.values())
        message = described(adapter).put_group("adapter", state)
        replies = cohort.ask(self.finish, message, key="finish", expect=own_expectation(job, collects=self.collect))
        if not self.collect:
            job.note("clients keep their models: the server has none to score")
            return Fused()
        return Fused(personal=self.personal(replies, job, adapter, state))

    def adapter(self, job: Job) -> ModelSpec:
        """The adapter that all clients have.

        Args:
            job: says what inputs are.

        Raises:
            ConfigError: a client's model gives no class logits.
        """
        for spec in [job.model, *job.client_models.values()]:
            if isinstance(spec.build(), HasObjective):
                raise ConfigError(
                    "pfedlora averages the answers of classifiers, and a client's model is none",
                    where="model",
                    fix="use a classifier, or heterotune",
                )
        shape = job.model.input_shape
        kind: InputKind
        if self.inputs != "auto":
            kind = self.inputs
        elif job.model.recipe.get("kind") == "transformers":
            kind = "tokens"
        else:
            kind = "image" if len(shape) == 3 else "vector"
        recipe = small_recipe(
            kind, shape, job.model.num_classes, width=self.width, rank=self.rank, num_buckets=self.num_buckets
        )
        return ModelSpec(recipe, job.model.seed, shape, job.model.num_classes)

    def personal(self, replies: Replies, job: Job, adapter: ModelSpec, state: State) -> dict[str, Artifact]:
        """Each client's model and the common adapter, answering together.

        Args:
            replies: uploads with ``own/*``.
            job: says which model each client owns.
            adapter: the adapter.
            state: its weights.
        """
        found = {}
        for client_id in replies:
            spec = job.model_of(client_id)
            own, small = spec.build(), adapter.build()
            load_state(own, replies[client_id].group("own"))
            load_state(small, state)
            recipes = [spec.recipe, adapter.recipe]
            both = Ensemble([own, small], combine="mean_logits", num_classes=spec.num_classes, recipes=recipes)
            shares = torch.tensor([1 - self.adapter_weight, self.adapter_weight])
            both.weights.copy_(shares[:, None].expand_as(both.weights))
            template = None if spec.template is None else both
            found[client_id] = Artifact(both.recipe, detached_state(both), template=template)
        return found


def own_model(client: Client) -> nn.Module:
    """The client's own model as it kept it, or with its first weights.

    Args:
        client: the client.
    """
    module, kept = client.model.build(), client.state.group("own")
    if kept:
        load_state(module, kept)
    return module


def own_expectation(job: Job, *, collects: bool) -> Callable[[str], dict[str, Tensor | type]]:
    """What an upload of a client's own model must look like.

    Args:
        job: says which model each client owns.
        collects: whether it is uploaded at all.
    """

    def expect(client_id: str) -> dict[str, Tensor | type]:
        state = job.model_of(client_id).build().state_dict() if collects else {}
        return {**{f"own/{name}": tensor for name, tensor in state.items()}, "num_examples": int}

    return expect


def beside(other: nn.Module, weight: float) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
    """The loss of a classifier that answers together with a frozen one.

    Args:
        other: stays as it is; on the device where the training takes place.
        weight: of the trained classifier's answer; the other has the rest.

    Returns:
        ``(module, x, y)`` to the cross-entropy of the weighted mean of both logits.
    """
    other.eval()

    def loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            known = other(x).float()
        return F.cross_entropy(weight * module(x).float() + (1 - weight) * known, y)

    return loss
