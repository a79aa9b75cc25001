"""What methods share whose clients own models of different sizes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort, Replies
from fedfuse.core.errors import ConfigError
from fedfuse.core.expecting import Expectation
from fedfuse.core.method import Job, Task
from fedfuse.core.payload import Payload
from fedfuse.methods.tasks import LocalTraining, model_expectation

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class OwnSizes(LocalTraining):
    """Methods in one round or many, for clients that may own models of different sizes.

    Args:
        local: how clients train.
        num_rounds: rounds, at least 1.
    """

    num_rounds: int = 1

    def __post_init__(self) -> None:
        if self.num_rounds < 1:
            raise ConfigError(f"num_rounds is {self.num_rounds}", where="method.num_rounds", fix="give at least 1")
        # Too few epochs are told now, not when the clients have begun.
        self.local.share(0, self.num_rounds)

    def ask_models(
        self,
        cohort: Cohort,
        job: Job,
        number: int,
        starts: Mapping[str, State],
        *,
        task: Task | None = None,
        specs: Mapping[str, ModelSpec] | None = None,
    ) -> Replies:
        """Ask every client to train a model from given weights; with nothing to give it is FedAvg's question.

        Args:
            cohort: the clients.
            job: says which model each client owns.
            number: of the round, from 0.
            starts: client id to the weights to start from; who has none starts from its first weights.
            task: what to ask; plain local training of the client's own model if left out.
            specs: client id to the model that is trained there; then it travels with the question.
        """
        if task is None and self.num_rounds == 1 and not any(starts.values()):
            return self.local_models(cohort, job)
        share = self.local.share(number, self.num_rounds)

        # Clients that are asked the same get the same message, which is then encoded once.
        made: dict[tuple[int, str], Payload] = {}
        messages = {}
        for client_id in cohort.client_ids:
            start = starts.get(client_id, {})
            spec = None if specs is None else specs[client_id]
            known = (id(start) if start else 0, spec.digest if spec else "")
            if known not in made:
                made[known] = Payload({"num_epochs": share}).put_group("model", start)
                if spec is not None:
                    made[known].update(described(spec))
            messages[client_id] = made[known]
        looks = expectations_of(specs or {client_id: job.model_of(client_id) for client_id in cohort.client_ids})
        return cohort.ask(task or self.train_local, messages, key=f"round_{number}", expect=lambda c: looks[c])


def all_models(job: Job) -> list[ModelSpec]:
    """Every different model of a federation, from the smallest to the largest.

    The common model counts, whether or not a client owns it: a client that knows only the configuration must come to
    the same list.

    Args:
        job: says which model each client owns.
    """
    specs = {spec.digest: spec for spec in [job.model, *job.client_models.values()]}
    return [specs[digest] for _, digest in sorted((num_values(spec), digest) for digest, spec in specs.items())]


def num_values(spec: ModelSpec) -> int:
    """How many numbers all parameters of a model hold, also those that are never trained.

    Args:
        spec: the model.
    """
    return sum(parameter.numel() for parameter in spec.build().parameters())


def described(spec: ModelSpec) -> Payload:
    """A model as part of a message, for clients that own another one.

    Args:
        spec: the model.

    Returns:
        ``recipe`` and ``seed``.

    Raises:
        ConfigError: it is a module that no recipe describes.
    """
    if spec.template is not None:
        raise ConfigError(
            "this model cannot be described, so a client that owns another one cannot build it",
            where=type(spec.template).__name__,
            fix="use models of a family, or write it with the layers and functions of torch",
        )
    return Payload({"recipe": json.dumps(spec.recipe, sort_keys=True), "seed": spec.seed})


def received(client: Client, msg: Payload) -> ModelSpec:
    """The model that a message describes.

    Args:
        client: who got it; inputs and classes are those of its own model.
        msg: holds what :func:`described` gave.
    """
    seed = msg["seed"]
    assert isinstance(seed, int)
    own = client.model
    return ModelSpec(json.loads(msg.text("recipe")), seed, own.input_shape, own.num_classes)


def expectations_of(specs: Mapping[str, ModelSpec]) -> dict[str, Expectation]:
    """What each client's upload must look like.

    Args:
        specs: client id to the model that it trains.
    """
    by_digest: dict[str, Expectation] = {}
    found = {}
    for client_id, spec in specs.items():
        digest = spec.digest
        if digest not in by_digest:
            by_digest[digest] = model_expectation(spec)
        found[client_id] = by_digest[digest]
    return found
