"""FuseFL: blocks trained and fused bottom-up, so that each next block sees every client's features."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fedfuse.core.artifact import Artifact, ModelSpec, build, detached_state, load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError, ModelError
from fedfuse.core.examples import Examples
from fedfuse.core.expecting import Expectation
from fedfuse.core.method import Fused, Job, Method, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.heads import Head
from fedfuse.methods.tasks import MOMENT_UPLOADS, moments_expectation, moments_upload, read_moments
from fedfuse.models import with_width
from fedfuse.models.blocks import Pieces, cut_spec
from fedfuse.models.fused import Adaptor, Column, FusedBlocks, Level, channel_dim, check_side_by_side
from fedfuse.ops.moments import pool
from fedfuse.training import LocalSGD, predict, train

_CACHE_BYTES = 2 << 30
"""Features of frozen levels are computed once per exchange when they fit into this; else in every batch."""

CUT = ("num_blocks", "balance", "points")


@register_method("fusefl", paper="https://openreview.net/forum?id=E7fZOoiEKl", reference="Tang et al., NeurIPS 2024")
@dataclass(frozen=True, kw_only=True)
class FuseFL(Method):
    """Networks cut into blocks, trained and fused bottom-up.

    Tang et al., FuseFL: One-Shot Federated Learning through the Lens of Causality with Progressive Model Fusion,
    NeurIPS 2024, https://openreview.net/forum?id=E7fZOoiEKl, algorithm 1.

    Exchanges: ``block_0`` to ``block_{K-1}``: every client trains its network on top of the frozen fused levels and
    uploads one block with its adaptor (the last one with its head); the bytes add up to one model. The next message
    carries the level's blocks of all clients. Then, for the heads that need them, ``moments``: class counts, means
    and covariance of the fused features.

    Departures:
        - The exchange of moments is declared and counted; the official code reads the clients' loaders.
        - The pooled covariance is centred; the official code leaves it uncentred.
        - The head is made by LDA from the pooled moments on all columns' features by default; the paper calibrates
          the averaged heads (``head: {kind: calibrated}``). Measured better, see the card.
        - BatchNorm of frozen blocks runs in evaluation mode; the official code lets each client move it.
        - Adaptors travel in bfloat16.
        - Frozen features are computed once per exchange where there is no augmentation.

    Args:
        num_blocks: K in the paper, at least 1.
        adaptor: ``conv1x1``, ``mean``, or ``attention`` over the clients' features at each position.
        adaptor_dtype: in what adaptors travel; ``bf16`` halves their bytes.
        local: how clients train; ``num_epochs`` is divided over the K exchanges.
        head: how the head is made.
        width: ``own`` cuts each client's model as it is; ``match`` narrows the model until the whole fused network has
            at most ``match_factor`` times the parameters of one model; a number sets the width.
        match_factor: budget for ``width: match``, in models; the number of clients gives the ensemble's size.
        feature_dropout: probability that a client's features are dropped for a training example, in [0, 1).
        frozen_batchnorm: ``eval``, or ``train``: batch statistics in frozen blocks during training, as published.
        balance: what blocks are balanced by, ``parameters`` or ``compute``.
        points: names of layers after which to cut, instead of balancing.
    """

    num_blocks: int = 4
    adaptor: Literal["conv1x1", "mean", "attention"] = "conv1x1"
    adaptor_dtype: Literal["bf16", "fp32"] = "bf16"
    local: LocalSGD = field(default_factory=LocalSGD)
    head: Head = field(default_factory=Head)
    width: Literal["own", "match"] | int = "own"
    match_factor: float = 1.0
    feature_dropout: float = 0.0
    frozen_batchnorm: Literal["eval", "train"] = "eval"
    balance: Literal["parameters", "compute"] = "parameters"
    points: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.num_blocks < 1:
            raise ConfigError(f"num_blocks is {self.num_blocks}", where="method.num_blocks", fix="give at least 1")
        # Too few epochs are told now, not when the clients have begun.
        self.local.share(0, self.num_blocks)
        if not self.match_factor > 0:
            fix = "give a number above 0"
            raise ConfigError(f"match_factor is {self.match_factor}", where="method.match_factor", fix=fix)
        if isinstance(self.width, int) and self.width < 1:
            raise ConfigError(f"width is {self.width}", where="method.width", fix="give at least 1, own or match")
        if not 0 <= self.feature_dropout < 1:
            raise ConfigError(
                f"feature_dropout is {self.feature_dropout}",
                where="method.feature_dropout",
                fix="give a probability in [0, 1)",
            )

    @client_task(
        uploads={
            "block/*": "weights and buffers of one block",
            "adaptor/*": "weights of the adaptor in front of it",
            "head/*": "weights of the client's own head, with the last block",
            "num_examples": "number of training examples",
            "curve/*": "training loss and validation scores per epoch",
        },
        settings=(*CUT, "adaptor", "adaptor_dtype", "local", "feature_dropout", "frozen_batchnorm"),
        state=True,
    )
    def train_block(self, client: Client, msg: Payload) -> Payload:
        """Train the client's network above the frozen levels and upload its lowest block.

        Args:
            client: its state keeps the frozen levels and the blocks that wait for their turn.
            msg: ``level``, ``num_epochs``, ``width``, and the fused levels that the client does not have yet.
        """
        level, spec = int(msg.number("level")), _resized(client.model, msg)
        receive(client.state, msg)
        pieces = self._pieces(spec).copy()
        blocks, head = pieces.blocks[level:], pieces.head
        for offset, block in enumerate(blocks):
            _restore(block, client.state.group(f"own/{level + offset}"))
        _restore(head, client.state.group("head"))
        frozen = fused_levels(client.state, level, pieces) if level else None
        with client.rng.ambient("adaptor"):
            adaptor = self._adaptor(level, spec, client.state)
        stage = Stage(adaptor, blocks, head, self.feature_dropout)
        curves = self._train(stage, frozen, client, int(msg.number("num_epochs")))
        upload = Payload({"num_examples": len(client.data.train)})
        upload.put_group("block", detached_state(blocks[0])).put_group("curve", curves)
        if stage.adaptor is not None:
            upload.put_group("adaptor", {n: t.to(self._dtype) for n, t in detached_state(stage.adaptor).items()})
        if level == self.num_blocks - 1:
            upload.put_group("head", detached_state(head))
        for key in [key for key in client.state if key.startswith(("own/", "head/"))]:
            del client.state[key]
        for offset, block in enumerate(blocks[1:], start=1):
            client.state.put_group(f"own/{level + offset}", detached_state(block))
        client.state.put_group("head", detached_state(head))
        return upload

    @client_task(uploads=MOMENT_UPLOADS, settings=(*CUT, "head"), state=True)
    def class_moments(self, client: Client, msg: Payload) -> Payload:
        """Moments of the fused features on the client's data.

        Args:
            client: its state keeps the levels that it was sent before.
            msg: ``width``, and the levels that the client does not have yet.
        """
        receive(client.state, msg)
        pieces = self._pieces(_resized(client.model, msg))
        net = fused_levels(client.state, self.num_blocks, pieces, features=self.head.sees)
        return moments_upload(net, client, per_class=self.head.sends_per_class)

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Ask for block after block, fuse each level, make the head.

        Args:
            cohort: the clients.
            job: says which model each client owns.
        """
        width = self.width_for(job, len(cohort.client_ids))
        terms = Payload({"width": width})
        specs = {client_id: _resized(job.model_of(client_id), terms) for client_id in cohort.client_ids}
        self._check({client_id: self._pieces(spec) for client_id, spec in specs.items()})
        levels: list[Payload] = []
        received: dict[str, int] = dict.fromkeys(cohort.client_ids, 0)
        replies = None
        for k in range(self.num_blocks):
            facts = {"level": k, "num_epochs": self.local.share(k, self.num_blocks), "width": width}
            messages = messages_for(received, levels, facts)
            replies = cohort.ask(
                self.train_block, messages, key=f"block_{k}", expect=self._expectations(k, specs, levels)
            )
            received.update(dict.fromkeys(replies, k))
            levels.append(self._level(k, {c: replies[c] for c in replies}, specs, bool(job.client_models)))
        assert replies is not None
        heads = [_filled(copy.deepcopy(self._pieces(specs[c]).head), replies[c].group("head")) for c in replies]
        whole = Payload()
        for level in levels:
            receive(whole, level)
        own = self._pieces(specs[next(iter(replies))])
        net = fused_levels(whole, self.num_blocks, own, features=self.head.sees)
        moments = None
        if self.head.needs_moments:
            widths = [head.in_features for head in heads]
            expect = moments_expectation(
                job.model.num_classes,
                sum(widths) if self.head.sees == "concat" else widths[0],
                per_class=self.head.sends_per_class,
            )
            messages = messages_for(received, levels, {"width": width})
            answers = cohort.ask(self.class_moments, messages, key="moments", expect=expect)
            moments = pool(read_moments(answers[c]) for c in answers)
        net.head = self.head.make(heads, moments, job)
        net.block_recipes = [
            [self._pieces(specs[c["client"]]).recipes[k] for c in json.loads(whole.text(f"columns/{k}"))]
            for k in range(self.num_blocks)
        ]
        job.facts.update(
            {"num_parameters": _num_parameters(net), "width": width or "own", "num_blocks": self.num_blocks}
        )
        is_opaque = any(spec.template is not None for spec in specs.values())
        return Fused(model=Artifact(net.recipe, detached_state(net), template=net if is_opaque else None))

    def width_for(self, job: Job, num_clients: int) -> int:
        """The width of the clients' models under the setting ``width``; 0 leaves them as they are.

        Args:
            job: says which model the clients own.
            num_clients: columns of the fused network.

        Raises:
            ModelError: no width fits the budget.
        """
        if self.width == "own":
            return 0
        if isinstance(self.width, int):
            return self.width
        budget = self.match_factor * _num_parameters(job.model.build())
        low, high = 0, int(job.model.recipe.get("settings", {}).get("width", 0) or 512)
        while low < high:
            middle = (low + high + 1) // 2
            if self._num_fused_parameters(with_width(job.model, middle), num_clients) <= budget:
                low = middle
            else:
                high = middle - 1
        if low == 0:
            raise ModelError(
                f"not even width 1 fits {num_clients} columns into {budget:,.0f} parameters",
                where="method.width",
                fix="raise method.match_factor or the model's width",
            )
        return low

    def _num_fused_parameters(self, spec: ModelSpec, num_clients: int) -> int:
        pieces = self._pieces(spec)
        total = num_clients * sum(_num_parameters(block) for block in pieces.blocks)
        for k in range(1, self.num_blocks):
            channels, ndim = pieces.interfaces[k - 1]
            total += num_clients * _num_parameters(Adaptor(self.adaptor, [channels] * num_clients, channels, ndim))
        return total + (pieces.head.in_features * num_clients + 1) * pieces.head.out_features

    def _check(self, pieces: Mapping[str, Pieces]) -> None:
        """Find what cannot be fused before any client works."""
        self.head.check([each.head.in_features for each in pieces.values()])
        for k in range(1, self.num_blocks):
            check_side_by_side([each.shapes[k - 1] for each in pieces.values()])
            widths = [each.interfaces[k - 1][0] for each in pieces.values()]
            with torch.device("meta"):
                for each in pieces.values():
                    Adaptor(self.adaptor, widths, *each.interfaces[k - 1])

    def _pieces(self, spec: ModelSpec) -> Pieces:
        return cut_spec(spec, self.num_blocks, balance=self.balance, points=self.points)

    @property
    def _dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.adaptor_dtype == "bf16" else torch.float32

    def _adaptor(self, level: int, spec: ModelSpec, known: Mapping[str, Any]) -> Adaptor | None:
        if level == 0:
            return None
        columns = json.loads(known[f"columns/{level - 1}"])
        channels, ndim = self._pieces(spec).interfaces[level - 1]
        return Adaptor(self.adaptor, [column["channels"] for column in columns], channels, ndim)

    def _train(self, stage: Stage, frozen: FusedBlocks | None, client: Client, num_epochs: int) -> dict[str, Tensor]:
        examples, validation, augment = client.data.train, client.data.validation, client.data.augment
        module: nn.Module = stage
        if frozen is not None:
            frozen.requires_grad_(False)
            can_cache = augment == "none" and self.frozen_batchnorm == "eval"
            if can_cache and _map_bytes(frozen, examples) <= _CACHE_BYTES:
                examples = Examples(predict(frozen, examples.x, device=client.device), examples.y)
                if len(validation):
                    validation = Examples(predict(frozen, validation.x, device=client.device), validation.y)
            else:
                module = OnFrozen(frozen, stage, trains_batchnorm=self.frozen_batchnorm == "train")
        return train(
            module,
            examples,
            self.local,
            rng=client.rng,
            device=client.device,
            num_epochs=num_epochs,
            augment=augment,
            validation=validation,
            progress=client.progress,
        )

    def _expectations(self, k: int, specs: Mapping[str, ModelSpec], levels: list[Payload]) -> Any:
        known = levels[-1] if levels else Payload()

        @cache
        def expect(client_id: str) -> Expectation:
            spec = specs[client_id]
            pieces = self._pieces(spec)
            wanted: dict[str, Any] = {f"block/{n}": t for n, t in pieces.blocks[k].state_dict().items()}
            adaptor = self._adaptor(k, spec, known)
            if adaptor is not None:
                wanted.update({f"adaptor/{n}": t.to(self._dtype) for n, t in adaptor.state_dict().items()})
            if k == self.num_blocks - 1:
                wanted.update({f"head/{n}": t for n, t in pieces.head.state_dict().items()})
            return {**wanted, "num_examples": int}

        return expect

    def _level(self, k: int, replies: Mapping[str, Payload], specs: Mapping[str, ModelSpec], is_mixed: bool) -> Payload:
        """One fused level as it is sent to clients: every column's tensors, and what the columns are."""
        level, columns = Payload(), []
        for client_id, reply in replies.items():
            spec = specs[client_id]
            pieces = self._pieces(spec)
            channels, ndim = pieces.interfaces[k]
            into = pieces.interfaces[k - 1][0] if k else 0
            column = {"client": client_id, "channels": channels, "ndim": ndim, "into": into, "adaptor": self.adaptor}
            columns.append({**column, "recipe": pieces.recipes[k]} if is_mixed else column)
            level.put_group(f"fused/{k}/{client_id}/block", reply.group("block"))
            level.put_group(f"fused/{k}/{client_id}/adaptor", reply.group("adaptor"))
        level[f"columns/{k}"] = json.dumps(columns)
        return level


class Stage(nn.Module):
    """What a client trains: an adaptor, its blocks from one level upwards, and its head.

    Args:
        adaptor: ``None`` at the lowest level.
        blocks: from the level upwards.
        head: the client's head.
        feature_dropout: probability that a column of the level below is dropped for an example.
    """

    def __init__(
        self, adaptor: Adaptor | None, blocks: list[nn.Module], head: nn.Linear, feature_dropout: float
    ) -> None:
        super().__init__()
        self.adaptor, self.blocks, self.head = adaptor, nn.Sequential(*blocks), head
        self.feature_dropout = feature_dropout

    def forward(self, x: Tensor) -> Tensor:
        """Classify.

        Args:
            x: inputs at the lowest level, else the joined maps of the level below.

        Returns:
            Logits, shape ``(n, num_classes)``.
        """
        if self.adaptor is not None:
            if self.training and self.feature_dropout > 0:
                x = drop_columns(x, self.adaptor.num_channels, self.feature_dropout)
            x = self.adaptor(x)
        logits: Tensor = self.head(self.blocks(x))
        return logits


class OnFrozen(nn.Module):
    """A stage behind its frozen levels, for training that cannot compute their features once.

    Args:
        frozen: the fused levels.
        stage: what is trained.
        trains_batchnorm: let BatchNorm of the frozen levels use batch statistics in training.
    """

    def __init__(self, frozen: nn.Module, stage: Stage, *, trains_batchnorm: bool) -> None:
        super().__init__()
        self.frozen, self.stage, self.trains_batchnorm = frozen, stage, trains_batchnorm

    def train(self, mode: bool = True) -> OnFrozen:
        """Set the mode of the stage; the frozen levels stay in evaluation mode unless told otherwise.

        Args:
            mode: whether to train.
        """
        super().train(mode)
        self.frozen.train(mode and self.trains_batchnorm)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Classify.

        Args:
            x: inputs, shape ``(n, *input_shape)``.

        Returns:
            Logits, shape ``(n, num_classes)``.
        """
        with torch.no_grad():
            maps = self.frozen(x)
        logits: Tensor = self.stage(maps)
        return logits


def drop_columns(joined: Tensor, num_channels: tuple[int, ...], probability: float) -> Tensor:
    """Drop whole columns at random, per example, and scale up what is kept.

    Draws from the global generator, which is seeded for the exchange.

    Args:
        joined: maps joined over channels.
        num_channels: channels of each column.
        probability: of dropping, in [0, 1).

    Returns:
        Same shape.
    """
    dim = channel_dim(joined.ndim)
    kept = (torch.rand(len(joined), len(num_channels), device=joined.device) >= probability) / (1 - probability)
    mask = kept.repeat_interleave(torch.tensor(num_channels, device=joined.device), dim=1)
    shape = [len(joined)] + [1] * (joined.ndim - 1)
    shape[dim] = -1
    return joined * mask.reshape(shape)


def receive(state: Payload, msg: Payload) -> None:
    """Keep the fused levels that a message carries.

    Args:
        state: changed in place.
        msg: may hold ``fused/*`` and ``columns/*``.
    """
    for key in msg:
        if key.startswith(("fused/", "columns/")):
            state[key] = msg[key]


def messages_for(received: Mapping[str, int], levels: list[Payload], facts: Mapping[str, int]) -> dict[str, Payload]:
    """A message per client with the levels that it does not have yet; clients that lack the same share one message.

    Args:
        received: client id to the number of levels that it has.
        levels: all fused levels so far.
        facts: scalars for everybody.
    """
    made: dict[int, Payload] = {}
    for have in sorted(set(received.values())):
        made[have] = Payload(dict(facts))
        for level in levels[have:]:
            receive(made[have], level)
    return {client_id: made[have] for client_id, have in received.items()}


def fused_levels(known: Payload, num_levels: int, own: Pieces, *, features: str = "concat") -> FusedBlocks:
    """Build the frozen levels from their tensors.

    Args:
        known: holds ``fused/*`` and ``columns/*``.
        num_levels: how many.
        own: pieces of the client's own model; every column is built from them unless the columns bring recipes.
        features: what the network gives back of the last level.

    Returns:
        The network without a head; for fewer levels than the whole the joined maps of the last one.
    """
    levels: list[Level] = []
    below: list[int] = []
    ndim = 0
    for k in range(num_levels):
        columns = []
        described = json.loads(known.text(f"columns/{k}"))
        for facts in described:
            prefix = f"fused/{k}/{facts['client']}"
            block = build(facts["recipe"]) if "recipe" in facts else copy.deepcopy(own.blocks[k])
            load_state(block, known.group(f"{prefix}/block"))
            adaptor = Adaptor(facts["adaptor"], below, facts["into"], ndim) if k else None
            if adaptor is not None:
                load_state(adaptor, known.group(f"{prefix}/adaptor"))
            columns.append(Column(adaptor, block))
        below, ndim = [facts["channels"] for facts in described], described[0]["ndim"]
        levels.append(Level(columns))
    return FusedBlocks(levels, features=features)


def _resized(spec: ModelSpec, terms: Payload) -> ModelSpec:
    width = int(terms.number("width"))
    return with_width(spec, width) if width else spec


def _restore(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    if state:
        load_state(module, state)


def _filled(module: nn.Linear, state: Mapping[str, Tensor]) -> nn.Linear:
    load_state(module, state)
    return module


def _num_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _map_bytes(frozen: nn.Module, examples: Examples) -> int:
    one = predict(frozen, examples.x[:1])
    return one.numel() * one.element_size() * len(examples)
