"""Clients with foundation models of different sizes that share the experts of their adapters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from fedfuse.core.artifact import Artifact, detached_state, load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort, Replies
from fedfuse.core.errors import ConfigError
from fedfuse.core.expecting import Expectation
from fedfuse.core.method import Fused, Job, Method, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.sizes import State, all_models
from fedfuse.methods.tasks import example_weights
from fedfuse.models.foundation.dema import MixtureShape, Tuned, expert_of
from fedfuse.models.foundation.placing import Plan
from fedfuse.ops.gradient_alignment import mean_update, num_conflicts
from fedfuse.ops.local_steps import gradient_weights, tilt
from fedfuse.rules import fuse_uploads
from fedfuse.rules.mean import Mean
from fedfuse.training import LocalSGD, plain_loss, step_rates, train

Loss = Callable[[nn.Module, Tensor, Tensor], Tensor]

SHARED_UPLOADS = {
    "shared/*": "experts and mixing weights of the adapters, after training",
    "num_examples": "number of training examples",
    "curve/*": "training loss and validation scores per epoch",
}
OWN_UPLOADS = {
    "own/*": "what else the client trained (projections, head, its own model), with collect: true only",
    "num_examples": "number of training examples",
    "curve/*": "training loss and validation scores per epoch",
}


@register_method("heterotune", paper="https://arxiv.org/abs/2411.16796", reference="Jia et al., arXiv 2024")
@dataclass(frozen=True, kw_only=True)
class HeteroTune(Method):
    """Clients keep models of any size, with adapters in them whose inner parts all have in common.

    Jia et al., arXiv 2411.16796v2: a dense mixture of adapters (DeMA) behind blocks of the model, and an alignment of
    what models of different sizes learn (CMGA). This is a reading of the abstract: a mixture is
    h + up(gelu(sum_e p_e E_e down(h))): ``down`` and ``up`` are the client's own and fit its width, the experts E_e,
    one per size of model, and the shares p are common. A client trains all experts, its own size's at the full rate.
    Mixtures stand at equal relative depths. The server averages per size, takes from each size's update of an expert
    what opposes another size's, and averages these.

    Exchanges: ``num_rounds``, each uploads experts and shares, and nothing that depends on the size of a model; then
    ``finish``, which brings the last experts. There, with ``adopts``, clients train their own part against them, and
    with ``collect`` they upload it, so that a simulation can score it.

    Departures: all that the abstract leaves open is our choice; the card lists it. Client and server may also be
    without alignment. Models that are no transformers are cut into blocks of equal size.

    Args:
        local: how clients train; ``local.num_epochs`` is the total over all exchanges.
        num_rounds: rounds in which experts are trained, at least 1.
        num_positions: mixtures in every model, at least 1 and no more than the shallowest model's blocks.
        rank: width of the experts, at least 1.
        other_rate: how far a client moves the experts of other sizes, as a fraction of what it learnt, from 0 to 1.
        align_updates: CMGA at the server.
        align_gradients: CMGA at the client, from the second round on: weight of the gradient that the last aggregate
            moved by, added to the local one; 0 is none.
        adopts: whether the last share of the epochs trains the clients' own parts with the final experts fixed.
        collect: whether clients upload their own parts at the end; without it nobody but they has them.
    """

    local: LocalSGD = field(default_factory=LocalSGD)
    num_rounds: int = 1
    num_positions: int = 2
    rank: int = 16
    other_rate: float = 0.5
    align_updates: bool = True
    align_gradients: float = 0.0
    adopts: bool = True
    collect: bool = True

    def __post_init__(self) -> None:
        for name in ("num_rounds", "num_positions", "rank"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", where=f"method.{name}", fix="give at least 1")
        if not 0 <= self.other_rate <= 1:
            raise ConfigError(
                f"other_rate is {self.other_rate}", where="method.other_rate", fix="give a number from 0 to 1"
            )
        if not 0 <= self.align_gradients < float("inf"):
            raise ConfigError(
                f"align_gradients is {self.align_gradients}", where="method.align_gradients", fix="give 0 or more"
            )
        if self.align_gradients and (self.local.optimizer != "sgd" or self.local.patience is not None):
            raise ConfigError(
                "align_gradients needs to know how far a gradient moves the weights",
                where="method.align_gradients",
                fix="use optimizer: sgd without patience, or 0",
            )
        self.local.share(0, self.num_parts)

    @property
    def num_parts(self) -> int:
        """Exchanges that share the local epochs."""
        return self.num_rounds + self.adopts

    @client_task(
        uploads=SHARED_UPLOADS,
        settings=("local", "num_positions", "rank", "other_rate", "align_gradients"),
        state=True,
    )
    def train_mixtures(self, client: Client, msg: Payload) -> Payload:
        """Train the own part and all experts; keep the one, upload the other.

        Args:
            client: the client; its state holds its own part, and the experts that it was sent last.
            msg: ``expert``, the number of its own size's; ``num_experts``; ``seed`` of the experts; ``num_epochs``;
                after the first round ``shared/*`` to start from.
        """
        net = tuned(client, msg, self.num_positions, self.rank)
        before = client.state.group("last") or copied(net.shared())
        start, num_epochs = msg.group("shared"), int(msg.number("num_epochs"))
        take_over(net, client.state.group("own"), start)
        slopes: dict[str, Tensor] = {}
        if self.align_gradients and start:
            rates = step_rates(self.local, len(client.data.train), num_epochs)
            length = float(gradient_weights(rates, self.local.momentum).sum())
            # The last aggregate is what a mean gradient of this size would have moved the experts by.
            scale = self.align_gradients / length
            slopes = {name: (scale * (before[name] - tensor)).to(client.device) for name, tensor in start.items()}
        first = copied(net.shared())

        def loss(module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            named = dict(module.named_parameters())
            return plain_loss(module, x, y) + tilt([named[name] for name in slopes], slopes.values())

        curves = learn(net, client, self.local, num_epochs, loss if slopes else None)
        state = detached_state(net)
        own = {name: tensor for name, tensor in state.items() if name not in first}
        client.state.put_group("own", own).put_group("last", first)
        shared = {name: state[name] for name in first}
        upload = Payload({"num_examples": len(client.data.train)})
        upload.put_group("shared", damped(first, shared, int(msg.number("expert")), self.other_rate))
        return upload.put_group("curve", curves)

    @client_task(uploads=OWN_UPLOADS, settings=("local", "num_positions", "rank", "collect"), state=True)
    def finish(self, client: Client, msg: Payload) -> Payload:
        """Take over the final experts, and train the own part with them.

        Args:
            client: the client; its state holds its own part.
            msg: ``expert``, ``num_experts``, ``seed`` and ``shared/*``; ``num_epochs``, 0 for no training.
        """
        net = tuned(client, msg, self.num_positions, self.rank)
        shared, num_epochs = msg.group("shared"), int(msg.number("num_epochs"))
        take_over(net, client.state.group("own"), shared)
        upload = Payload({"num_examples": len(client.data.train)})
        if num_epochs:
            for name, parameter in net.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and name not in shared)
            upload.put_group("curve", learn(net, client, self.local, num_epochs, None))
        own = {name: tensor for name, tensor in detached_state(net).items() if name not in shared}
        client.state.put_group("own", own).put_group("last", shared)
        return upload.put_group("own", own) if self.collect else upload

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Send experts, let clients train, average per size, align, average the sizes, and again.

        Args:
            cohort: the clients.
            job: says which model each client owns.
        """
        specs = all_models(job)
        numbers = {spec.digest: number for number, spec in enumerate(specs)}
        size_of = {client_id: numbers[job.model_of(client_id).digest] for client_id in cohort.client_ids}
        shape = MixtureShape(self.num_positions, len(specs), self.rank, job.model.seed)
        plans = [Plan(spec, shape) for spec in specs]
        shared: State = shape.first_shared()
        expect: Expectation = {**{f"shared/{name}": tensor for name, tensor in shared.items()}, "num_examples": int}
        places = {job.model_of(c).digest: [p.name for p in plans[size_of[c]].places] for c in size_of}
        job.facts["sizes"] = [
            {"clients": sorted(c for c in size_of if size_of[c] == k), "behind": places.get(spec.digest, [])}
            for k, spec in enumerate(specs)
        ]

        def ask_all(number: int, start: State) -> dict[str, Payload]:
            share = self.local.share(number, self.num_parts) if number < self.num_parts else 0
            facts = {"num_experts": len(specs), "num_epochs": share, "seed": shape.seed}
            made = [Payload({**facts, "expert": k}).put_group("shared", start) for k in range(len(specs))]
            return {client_id: made[k] for client_id, k in size_of.items()}

        conflicts = []
        for number in range(self.num_rounds):
            messages = ask_all(number, shared if number else {})
            replies = cohort.ask(self.train_mixtures, messages, key=f"round_{number}", expect=expect)
            shared, share_of_conflicts = self.aggregate(shared, replies, size_of)
            conflicts.append(share_of_conflicts)
        job.facts["conflicts"] = conflicts
        wanted = [_own_expectation(plan) if self.collect else {"num_examples": int} for plan in plans]
        replies = cohort.ask(
            self.finish, ask_all(self.num_rounds, shared), key="finish", expect=lambda c: wanted[size_of[c]]
        )
        if not self.collect:
            job.note("clients keep their own parts: the server has no model to score")
            return Fused()
        return Fused(personal={c: _artifact(plans[size_of[c]], replies[c].group("own"), shared) for c in replies})

    def aggregate(self, start: State, replies: Replies, size_of: Mapping[str, int]) -> tuple[dict[str, Tensor], float]:
        """The mean over clients of a size, then the aligned mean over sizes, each tensor by itself.

        Args:
            start: what the clients began the round with.
            replies: uploads with ``shared/*`` and ``num_examples``.
            size_of: client id to the number of its model's size.

        Returns:
            The new shared tensors, and the fraction of them in which two sizes opposed each other.
        """
        weights = dict(zip(replies, example_weights(replies), strict=True))
        uploads = dict(zip(replies, replies.uploads(), strict=True))
        updates: dict[str, dict[str, Tensor]] = {}
        totals: dict[str, float] = {}
        for size in sorted({size_of[client_id] for client_id in uploads}):
            members = [client_id for client_id in uploads if size_of[client_id] == size]
            counts = [weights[client_id] for client_id in members]
            parts = [uploads[client_id] for client_id in members]
            mean = fuse_uploads(parts, Mean(), counts, group="shared")
            name = f"size_{size:03d}"
            updates[name] = {key: mean[key].double() - tensor.double() for key, tensor in start.items()}
            totals[name] = sum(counts)
        found, num_opposed = {}, 0
        for key, tensor in start.items():
            changes = {name: update[key] for name, update in updates.items()}
            num_opposed += num_conflicts(changes) > 0
            change = mean_update(changes, totals, aligns=self.align_updates)
            found[key] = (tensor.double() + change).to(tensor.dtype)
        return found, num_opposed / len(start)


def tuned(client: Client, msg: Payload, num_positions: int, rank: int) -> Tuned:
    """The client's model with mixtures, with first weights.

    Args:
        client: the client.
        msg: ``expert``, ``num_experts`` and ``seed``.
        num_positions: of the method.
        rank: of the method.
    """
    seed = msg["seed"]
    assert isinstance(seed, int)
    shape = MixtureShape(num_positions, int(msg.number("num_experts")), rank, seed)
    return Plan(client.model, shape).build()


def copied(state: State) -> dict[str, Tensor]:
    """Tensors that stay as they are when the module that they are from is trained.

    Args:
        state: name to tensor.
    """
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def damped(first: State, trained: State, expert: int, other_rate: float) -> dict[str, Tensor]:
    """What a client says of the shared tensors: of its own size's expert and the shares all, of the others a part.

    Args:
        first: what the training began with.
        trained: what it ended with.
        expert: number of the own size's.
        other_rate: fraction of the change of the others.

    Returns:
        Name to tensor.
    """
    found = dict(trained)
    for name, tensor in trained.items():
        if expert_of(name) not in (None, expert):
            start = first[name].double()
            found[name] = (start + other_rate * (tensor.double() - start)).to(tensor.dtype)
    return found


def take_over(net: Tuned, own: State, shared: State) -> None:
    """Load what a client kept and what it was sent, as far as there is any.

    Args:
        net: changed in place.
        own: the client's own part; may be empty.
        shared: the common part; may be empty.
    """
    load_state(net, {**net.state_dict(), **own, **shared})


def learn(net: Tuned, client: Client, local: LocalSGD, num_epochs: int, loss: Loss | None) -> dict[str, Tensor]:
    """Train a model with mixtures on a client's data.

    Args:
        net: trained in place.
        client: whose data.
        local: how.
        num_epochs: for how long.
        loss: ``(module, x, y)`` to a scalar; the model's own if left out.

    Returns:
        Curves.
    """
    return train(
        net,
        client.data.train,
        local,
        rng=client.rng,
        device=client.device,
        num_epochs=num_epochs,
        augment=client.data.augment,
        validation=client.data.validation,
        loss=loss,
        progress=client.progress,
    )


def _own_expectation(plan: Plan) -> Expectation:
    return {**{f"own/{name}": tensor for name, tensor in plan.build().own().items()}, "num_examples": int}


def _artifact(plan: Plan, own: State, shared: State) -> Artifact:
    if plan.spec.template is None:
        return Artifact(plan.recipe, {**own, **shared})
    net = plan.build()
    take_over(net, own, shared)
    return Artifact(plan.recipe, detached_state(net), template=net)
