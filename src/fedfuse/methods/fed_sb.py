"""Square cores between two fixed matrices: r times r numbers per weight, averaged exactly."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fedfuse.core.artifact import ModelSpec, detached_state, load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort, Replies
from fedfuse.core.errors import ConfigError
from fedfuse.core.expecting import Expectation, TensorSpec
from fedfuse.core.method import Fused, Job, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.adapters import ClientAdapters, check_num_rounds, shares_of
from fedfuse.methods.fedavg import check_homogeneous
from fedfuse.methods.tasks import MODEL_UPLOADS, LocalTraining, example_weights, model_expectation, trained_upload
from fedfuse.models.foundation import Foundation, LoraLayout, lora_layout, with_rank
from fedfuse.ops.lora import Factors, decomposed, stacked, truncated_matrix
from fedfuse.rules import fuse_uploads
from fedfuse.rules.adapters.rule import check_rank_fits
from fedfuse.rules.mean import Mean
from fedfuse.training.gradients import mean_gradient

_LEFT, _RIGHT, _CORE = "left", "right", "core"


@dataclass(frozen=True)
class Frames:
    """The two matrices that stay, for every weight, and the core that training begins with.

    Args:
        left: B, orthonormal columns, shape ``(d_out, rank)``.
        right: A, orthonormal rows, shape ``(rank, d_in)``.
        core: the first R, shape ``(rank, rank)``.
    """

    left: Mapping[str, Tensor]
    right: Mapping[str, Tensor]
    core: Mapping[str, Tensor]


@register_method("fed_sb", paper="https://arxiv.org/abs/2502.15436", reference="Singhal et al., 2025")
@dataclass(frozen=True, kw_only=True)
class FedSB(LocalTraining):
    """LoRA as s B R A with B and A fixed by a first update of the whole weight: only R is trained, sent and averaged.

    Singhal et al., 2025, on LoRA-SB (Ponkshe et al., 2024): B and A are the leading singular vectors of an estimate of
    the first full update, and R begins with its singular values over s, so that the model begins where that update
    leads. The change is linear in R, so the mean of R is the exact mean of the changes; a rank far above LoRA's
    costs less.

    Exchanges: ``first_update``, which uploads the leading part of the gradient of every adapted weight, as much as one
    LoRA adapter; then ``num_rounds``, each of which uploads r x r numbers per weight, and the head. B and A travel to
    every client once, then only R does, whatever the number of clients.

    Departures: the paper takes the sign of the gradient over a few examples, which is AdamW's first step; here it is
    the gradient itself times ``local.learning_rate``, which is SGD's, because then the clients' parts add up and no
    full matrix has to travel. Each client sends the leading ``rank`` singular values of its gradient; the sum over
    clients is truncated again. Heads are averaged. ``local.num_epochs`` is the total over all rounds.

    Args:
        local: how clients train.
        num_rounds: at least 1.
        rank: r, of B, R and A, at least 1 and below every weight's dimensions; ``None`` is that of the model's adapter.
        num_first_examples: most examples per client for the first update, at least 1; drawn at random.
    """

    takes_heterogeneous: ClassVar[bool] = False

    num_rounds: int = 1
    rank: int | None = None
    num_first_examples: int = 256

    def __post_init__(self) -> None:
        check_num_rounds(self.num_rounds)
        for name in ("rank", "num_first_examples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}", where=f"method.{name}", fix="give at least 1")
        self.local.share(0, self.num_rounds)

    @client_task(
        uploads={
            "left/*": "left singular vectors of the gradient of every adapted weight, times roots of the values",
            "right/*": "right singular vectors, times roots of the values",
            "num_examples": "number of training examples",
        },
        settings=("local", "rank", "num_first_examples"),
    )
    def first_update(self, client: Client, msg: Payload) -> Payload:
        """Upload the leading part of the gradient of whole weights at the base model.

        Args:
            client: the client.
            msg: holds nothing.
        """
        model = self.widened(client.model)
        module, layout = model.build(), lora_layout(model)
        assert isinstance(module, Foundation)
        weights = {name: module.weight_of(name).requires_grad_(True) for name in layout.modules}
        train = client.data.train
        order = torch.randperm(len(train), generator=client.rng.torch("first examples"))
        chosen = train.subset(order[: self.num_first_examples].sort().values)
        found = mean_gradient(module, weights, chosen, device=client.device, batch_size=self.local.batch_size)
        upload = Payload({"num_examples": len(train)})
        for name in layout.modules:
            gradient = found[name].T if module.is_transposed(name) else found[name]
            part = truncated_matrix(gradient, layout.rank, client.rng.torch("leading part", name))
            upload[f"{_LEFT}/{name}"], upload[f"{_RIGHT}/{name}"] = part.left.float(), part.right.float()
        return upload

    @client_task(
        uploads={
            "core/*": "R of every adapter, r x r numbers",
            **MODEL_UPLOADS,
            "model/*": "the head, if one is trained",
        },
        settings=("local", "rank"),
        state=True,
    )
    def train_cores(self, client: Client, msg: Payload) -> Payload:
        """Train R between fixed B and A.

        Args:
            client: the client; its state holds B and A.
            msg: ``core/*`` to start from; ``left/*`` and ``right/*`` where the client has them not yet; ``model/*``,
                the head; ``num_epochs``.
        """
        if msg.group(_LEFT):
            client.state = Payload().put_group(_LEFT, msg.group(_LEFT)).put_group(_RIGHT, msg.group(_RIGHT))
        left, right, core = client.state.group(_LEFT), client.state.group(_RIGHT), msg.group(_CORE)
        model = self.widened(client.model)
        module, layout = model.build(), lora_layout(model)
        load_state(module, {**detached_state(module), **msg.group("model")})
        squares = {}
        for name, place in layout.modules.items():
            inner = module.get_parameter(place.right_key)
            inner.data = right[name].clone()
            inner.requires_grad_(False)
            linear = module.get_submodule(place.left_key.removesuffix(".weight"))
            parametrize.register_parametrization(linear, "weight", Between(left[name], core[name]), unsafe=True)
            squares[name] = linear.get_parameter("parametrizations.weight.original")
        trained = trained_upload(module, client, self.local, msg)
        upload = Payload().put_group(_CORE, {name: square.detach() for name, square in squares.items()})
        upload.put_group("model", {key: trained.tensor(f"model/{key}") for key in layout.others})
        for key in trained:
            if not key.startswith("model/"):
                upload[key] = trained[key]
        return upload

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Ask for the first update, fix B and A, average R, and again.

        Args:
            cohort: the clients.
            job: the common model.
        """
        check_homogeneous(job)
        adapters = ClientAdapters.of(job, self.name)
        model = self.widened(job.model)
        layout = lora_layout(model)
        for name, place in layout.modules.items():
            check_rank_fits(self.rank, name, place.shape)
        expect: dict[str, TensorSpec | type] = {"num_examples": int}
        for name, place in layout.modules.items():
            expect[f"{_LEFT}/{name}"] = TensorSpec((place.shape[0], layout.rank))
            expect[f"{_RIGHT}/{name}"] = TensorSpec((layout.rank, place.shape[1]))
        first = cohort.ask(self.first_update, key="first_update", expect=expect)
        frames = self.frames(first, layout)
        core, others, have_frames = dict(frames.core), dict[str, Tensor](), set[str]()
        for number in range(self.num_rounds):
            messages = {}
            for client_id in cohort.client_ids:
                message = Payload({"num_epochs": self.local.share(number, self.num_rounds)})
                if client_id not in have_frames:
                    message.put_group(_LEFT, frames.left).put_group(_RIGHT, frames.right)
                messages[client_id] = message.put_group(_CORE, core).put_group("model", others)
            replies = cohort.ask(
                self.train_cores, messages, key=f"cores_{number}", expect=_core_expectation(model, core)
            )
            have_frames |= set(replies)
            core = fuse_uploads(replies.uploads(), Mean(), example_weights(replies), group=_CORE)
            others = adapters.others(replies)
        changes = {
            name: Factors(place.scale * (frames.left[name].double() @ core[name].double()), frames.right[name].double())
            for name, place in layout.modules.items()
        }
        return Fused(model=adapters.artifact(job, changes, others))

    def widened(self, spec: ModelSpec) -> ModelSpec:
        """A model with an adapter of the rank that is asked for.

        Args:
            spec: a model with a LoRA adapter.

        Returns:
            The model itself where its own rank will do.
        """
        return spec if self.rank is None else dataclasses.replace(with_rank(spec, self.rank), initial={})

    def frames(self, replies: Replies, layout: LoraLayout) -> Frames:
        """Leading singular vectors of the mean gradient, and the core that makes the first step.

        Args:
            replies: to ``first_update``.
            layout: of the adapters.

        Returns:
            The fixed matrices and the first core, in float32.
        """
        uploads, shares = replies.uploads(), shares_of(replies)
        left, right, core = {}, {}, {}
        for name, place in layout.modules.items():
            parts = [Factors(_double(u[f"{_LEFT}/{name}"]), _double(u[f"{_RIGHT}/{name}"])) for u in uploads]
            u, s, vh = decomposed(stacked(parts, shares), layout.rank)
            left[name], right[name] = u.float(), vh.float()
            core[name] = torch.diag(-self.local.learning_rate / place.scale * s).float()
        return Frames(left, right, core)


class Between(nn.Module):
    """A weight that is a fixed matrix times a square one, of which the square one is trained.

    Args:
        left: the fixed matrix, shape ``(d_out, rank)``.
        core: what the square one begins with, shape ``(rank, rank)``.
    """

    left: Tensor

    def __init__(self, left: Tensor, core: Tensor) -> None:
        super().__init__()
        self.register_buffer("left", left.clone())
        self._first = core.clone()

    def forward(self, core: Tensor) -> Tensor:
        """The weight.

        Args:
            core: shape ``(rank, rank)``.

        Returns:
            Shape ``(d_out, rank)``.
        """
        return self.left @ core

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What is trained from the start on, instead of the weight that was there.

        Args:
            weight: not used.

        Returns:
            The first core.
        """
        return self._first


def _core_expectation(spec: ModelSpec, core: Mapping[str, Tensor]) -> Expectation:
    layout = lora_layout(spec)
    factors = {f"model/{key}" for place in layout.modules.values() for key in (place.left_key, place.right_key)}
    rest = {key: value for key, value in model_expectation(spec).items() if key not in factors}
    return {**rest, **{f"{_CORE}/{name}": tensor for name, tensor in core.items()}}


def _double(value: object) -> Tensor:
    assert isinstance(value, Tensor)
    return value.double()
