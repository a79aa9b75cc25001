"""What methods for LoRA adapters share: layouts that fit together, changes read one weight at a time, rounds."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from fedfuse.core.artifact import Artifact, ModelSpec, detached_state, load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort, Replies
from fedfuse.core.errors import ConfigError
from fedfuse.core.expecting import Expectation
from fedfuse.core.method import Fused, Job, client_task
from fedfuse.core.payload import Payload, Value
from fedfuse.methods.tasks import MODEL_UPLOADS, LocalTraining, example_weights, model_expectation, trained_upload
from fedfuse.models.foundation import Foundation, LoraLayout, lora_layout, with_rank
from fedfuse.ops.lora import Factors, compressed, stacked
from fedfuse.rules import fuse_uploads
from fedfuse.rules.adapters.rule import within_shape
from fedfuse.rules.mean import Mean

T = TypeVar("T")

FOLDED_LEFT, FOLDED_RIGHT = "folded_left", "folded_right"
"""Groups of keys under which a change of the base's weights travels."""


@dataclass(frozen=True)
class ClientAdapters:
    """The adapters of a federation: everybody's, found to change the same weights of the same base model.

    Args:
        common: layout of the job's model.
        own: client id to its layout, for clients whose model differs.
    """

    common: LoraLayout
    own: Mapping[str, LoraLayout]

    @classmethod
    def of(cls, job: Job, method: str, *, takes_magnitudes: bool = False) -> ClientAdapters:
        """The adapters of a job's models.

        Args:
            job: says which model each client owns.
            method: its name, for messages.
            takes_magnitudes: whether DoRA will do.

        Raises:
            ConfigError: a model has no LoRA adapter, clients' adapters do not fit together, or they have magnitudes.
        """
        common = lora_layout(job.model)
        own = of_each_model(job, lora_layout)
        if not takes_magnitudes and any(layout.has_magnitudes for layout in (common, *own.values())):
            raise ConfigError(
                f"DoRA rescales whole weights, so {method} has no sum of changes to fuse",
                where="model.peft.kind",
                fix="use kind: lora or rslora, or the method fedit",
            )
        for client_id, layout in own.items():
            if job.client_models[client_id].recipe.get("base") != job.model.recipe.get("base"):
                raise ConfigError(
                    "this client has another base model than the others",
                    where=f"model.clients.{client_id}",
                    fix="let clients differ in peft.rank and peft.lora_alpha only",
                )
            if _shapes(layout) != _shapes(common) or layout.others != common.others:
                raise ConfigError(
                    "this client's adapter changes other weights than the others'",
                    where=f"model.clients.{client_id}",
                    fix="let clients differ in peft.rank and peft.lora_alpha only",
                )
        return cls(common, own)

    def of_client(self, client_id: str) -> LoraLayout:
        """The layout of a client's own model.

        Args:
            client_id: its id.
        """
        return self.own.get(client_id, self.common)

    @property
    def rank(self) -> int:
        """The largest."""
        return max(layout.rank for layout in (self.common, *self.own.values()))

    def changes(self, replies: Replies) -> Iterator[tuple[str, list[Factors]]]:
        """Every weight with the clients' changes of it, read one weight at a time.

        Args:
            replies: uploads with ``model/*``.

        Yields:
            The weight's name, and one change per client in client-id order, in float64.
        """
        uploads = dict(zip(replies, replies.uploads(), strict=True))
        for name in self.common.modules:
            yield name, [self._change(client_id, upload, name) for client_id, upload in uploads.items()]

    def _change(self, client_id: str, upload: Mapping[str, Value], name: str) -> Factors:
        place = self.of_client(client_id).modules[name]
        left, right = upload[f"model/{place.left_key}"], upload[f"model/{place.right_key}"]
        assert isinstance(left, Tensor)
        assert isinstance(right, Tensor)
        return Factors(place.scale * left.double(), right.double())

    def others(self, replies: Replies) -> dict[str, Tensor]:
        """The mean of what is trained besides the adapters, such as a head, weighted by examples.

        Args:
            replies: uploads with ``model/*`` and ``num_examples``.

        Returns:
            Key to tensor, in the precision of the uploads.
        """
        keys = [f"model/{key}" for key in self.common.others]
        parts = [{key: upload[key] for key in keys} for upload in replies.uploads()]
        return fuse_uploads(parts, Mean(), example_weights(replies)) if keys else {}

    def artifact(self, job: Job, changes: Mapping[str, Factors], others: Mapping[str, Tensor]) -> Artifact:
        """The base model with an adapter that makes these changes, of the rank that they have.

        Args:
            job: the common model.
            changes: of every weight.
            others: what is trained besides.
        """
        # What is smaller than the rounding of the stored factors would only make the adapter larger.
        changes = {name: compressed(change, torch.finfo(torch.float32).eps) for name, change in changes.items()}
        rank = max(1, *(change.rank for change in changes.values()))
        job.facts["adapter_rank"] = rank
        spec = dataclasses.replace(with_rank(job.model, rank), initial={})
        return Artifact.of(spec, lora_layout(spec).state(changes, others))


def shares_of(replies: Replies) -> list[float]:
    """The clients' shares of all examples.

    Args:
        replies: uploads with ``num_examples``.

    Returns:
        One per client in client-id order, summing to 1.
    """
    weights = example_weights(replies)
    return [weight / sum(weights) for weight in weights]


def check_num_rounds(num_rounds: int) -> None:
    """Refuse less than one round.

    Args:
        num_rounds: as it was given.

    Raises:
        ConfigError: it is below 1.
    """
    if num_rounds < 1:
        raise ConfigError(f"num_rounds is {num_rounds}", where="method.num_rounds", fix="give at least 1")


def rounded(factors: Factors) -> Factors:
    """Factors as they travel.

    Args:
        factors: in float64.

    Returns:
        The same in the precision of float32, stored in float64.
    """
    return Factors(factors.left.float().double(), factors.right.float().double())


@dataclass
class FoldedRounds:
    """What the rounds so far have added to the base's weights, and how much of it each client has.

    Args:
        rounds: weight to change, one table per round, as they travel.
        heard: client id to the number of rounds whose changes it has.
    """

    rounds: list[dict[str, Factors]] = field(default_factory=list)
    heard: dict[str, int] = field(default_factory=dict)

    def total(self) -> dict[str, Factors]:
        """All rounds together; empty before the first."""
        return summed(self.rounds)

    def note(self, replies: Replies) -> None:
        """Remember who now has what was sent.

        Args:
            replies: to a message that held all that their clients lacked.
        """
        self.heard.update(dict.fromkeys(replies, len(self.rounds)))


def summed(tables: Sequence[Mapping[str, Factors]]) -> dict[str, Factors]:
    """Tables of changes added up.

    Args:
        tables: weight to change, the same weights in each.

    Returns:
        Weight to the sum, with no higher rank than the weight can have; empty for no table.
    """
    names = tables[0] if tables else ()
    return {
        name: rounded(within_shape(stacked([table[name] for table in tables], [1.0] * len(tables)))) for name in names
    }


@dataclass(frozen=True, kw_only=True)
class FoldingRounds(LocalTraining):
    """Base of methods that add a part of each round's sum to the base's weights, where no rank limits it.

    Args:
        local: how clients train.
        num_rounds: at least 1; ``local.num_epochs`` is the total over all of them.
    """

    num_rounds: int = 1

    def __post_init__(self) -> None:
        check_num_rounds(self.num_rounds)
        self.local.share(0, self.num_rounds)

    @client_task(uploads=MODEL_UPLOADS, settings=("local",), state=True)
    def train_folded(self, client: Client, msg: Payload) -> Payload:
        """Add what has come to the base's weights, and train an adapter on top.

        Args:
            client: the client; its state holds what was added in earlier rounds.
            msg: ``folded_left/*`` and ``folded_right/*``, what is new; ``model/*``, what of the adapter and the head
                does not start anew; ``num_epochs``.
        """
        module = client.model.build()
        assert isinstance(module, Foundation)
        news = folded(msg)
        table = summed([table for table in (folded(client.state), news) if table])
        module.add_to_base(table)
        load_state(module, {**detached_state(module), **msg.group("model")})
        client.state = put_folded(Payload(), table)
        return trained_upload(module, client, self.local, msg)

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Ask, split the sum into what goes into the base and what trains on, and again.

        Args:
            cohort: the clients.
            job: the models.
        """
        adapters = ClientAdapters.of(job, self.name)
        base, kept, others = FoldedRounds(), dict[str, Factors](), dict[str, Tensor]()
        for number in range(self.num_rounds):
            replies = self._ask(cohort, job, adapters, number, base, kept, others)
            base.note(replies)
            shares, others, into_base = shares_of(replies), adapters.others(replies), dict[str, Factors]()
            for name, parts in adapters.changes(replies):
                change, stays = self.split(parts, shares)
                into_base[name] = rounded(change)
                if stays is not None:
                    kept[name] = stays
            base.rounds.append(into_base)
        tables = [base.total(), *([kept] if kept else [])]
        changes = {name: stacked([t[name] for t in tables], [1.0] * len(tables)) for name in adapters.common.modules}
        return Fused(model=adapters.artifact(job, changes, others))

    def split(self, parts: Sequence[Factors], shares: Sequence[float]) -> tuple[Factors, Factors | None]:
        """Divide the weighted sum of the clients' changes of one weight.

        Args:
            parts: one per client.
            shares: of the examples, one per client.

        Returns:
            What goes into the base, and what the adapter starts the next round with; together the exact sum.
        """
        raise NotImplementedError

    def _ask(
        self,
        cohort: Cohort,
        job: Job,
        adapters: ClientAdapters,
        number: int,
        base: FoldedRounds,
        kept: Mapping[str, Factors],
        others: Mapping[str, Tensor],
    ) -> Replies:
        if self.num_rounds == 1:
            return self.local_models(cohort, job)
        key, num_epochs = f"round_{number}", self.local.share(number, self.num_rounds)
        expect = expected_models(job)
        if number == 0:
            # The question of every method whose clients begin with some epochs of plain training.
            return cohort.ask(
                self.train_local, Payload({"num_epochs": num_epochs}), key=key, expect=expected_models(job)
            )
        messages, news = {}, dict[int, dict[str, Factors]]()
        for client_id in cohort.client_ids:
            first = base.heard.get(client_id, 0)
            if first not in news:
                news[first] = summed(base.rounds[first:])
            message = put_folded(Payload({"num_epochs": num_epochs}), news[first])
            start = adapters.of_client(client_id).state(kept, others) if kept else others
            messages[client_id] = message.put_group("model", start)
        return cohort.ask(self.train_folded, messages, key=key, expect=expect)


def put_folded(payload: Payload, table: Mapping[str, Factors]) -> Payload:
    """Add changes of the base's weights to a payload.

    Args:
        payload: changed.
        table: weight to change.

    Returns:
        The payload.
    """
    for name, change in table.items():
        payload[f"{FOLDED_LEFT}/{name}"] = change.left.float()
        payload[f"{FOLDED_RIGHT}/{name}"] = change.right.float()
    return payload


def folded(payload: Payload) -> dict[str, Factors]:
    """The changes of the base's weights in a payload.

    Args:
        payload: may hold none.

    Returns:
        Weight to change, in float64.
    """
    right = payload.group(FOLDED_RIGHT)
    return {name: Factors(left.double(), right[name].double()) for name, left in payload.group(FOLDED_LEFT).items()}


def expected_models(job: Job) -> Callable[[str], Expectation]:
    """What the upload of each client's model must look like.

    Args:
        job: says which model each client owns.

    Returns:
        Client id to expectation.
    """
    common = model_expectation(job.model)
    own = of_each_model(job, model_expectation)
    return lambda client_id: own.get(client_id, common)


def of_each_model(job: Job, function: Callable[[ModelSpec], T]) -> dict[str, T]:
    """What a function makes of the models of single clients, called once for equal ones.

    Args:
        job: says which clients own a model that differs.
        function: of a model.

    Returns:
        Client id to result, in the order of the ids.
    """
    found: dict[str, T] = {}
    own = sorted(job.client_models.items())
    digests = {client_id: spec.digest for client_id, spec in own}
    for client_id, spec in own:
        alike = next((other for other in found if digests[other] == digests[client_id]), None)
        found[client_id] = function(spec) if alike is None else found[alike]
    return found


def _shapes(layout: LoraLayout) -> dict[str, tuple[int, int]]:
    return {name: module.shape for name, module in layout.modules.items()}
