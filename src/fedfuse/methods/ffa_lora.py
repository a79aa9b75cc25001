"""LoRA with A frozen, so that a mean of adapters is exact."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedfuse.core.artifact import Artifact, detached_state, load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort
from fedfuse.core.method import Fused, Job, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.adapters import ClientAdapters, check_num_rounds
from fedfuse.methods.fedavg import check_homogeneous
from fedfuse.methods.rounds import first_weights
from fedfuse.methods.tasks import (
    MODEL_SUMS,
    MODEL_UPLOADS,
    LocalTraining,
    example_weights,
    model_expectation,
    trained_upload,
)
from fedfuse.models.foundation import lora_layout
from fedfuse.rules import fuse_uploads
from fedfuse.rules.mean import Mean


@register_method("ffa_lora", paper="https://arxiv.org/abs/2403.12313", reference="Sun et al., ICLR 2024")
@dataclass(frozen=True, kw_only=True)
class FfaLora(LocalTraining):
    """LoRA whose A stays as it was drawn, the same for all: only B is trained, sent and averaged.

    Sun et al., ICLR 2024. With one A the mean of the changes is (sum w_i B_i) A, so averaging is exact, and half of
    the bytes travel.

    Exchanges: ``num_rounds``; each uploads B of every adapter, and the head. A never travels: everybody draws it.

    Departures: the head is trained and averaged. Every client takes part in every round. ``local.num_epochs`` is the
    total over all rounds.

    Args:
        local: how clients train.
        num_rounds: at least 1.
    """

    takes_heterogeneous: ClassVar[bool] = False
    sums: ClassVar[Mapping[str, Mapping[str, str]]] = {"train_left": MODEL_SUMS}

    num_rounds: int = 1

    def __post_init__(self) -> None:
        check_num_rounds(self.num_rounds)
        self.local.share(0, self.num_rounds)

    @client_task(
        uploads={**MODEL_UPLOADS, "model/*": "B of every adapter, and the head if one is trained"}, settings=("local",)
    )
    def train_left(self, client: Client, msg: Payload) -> Payload:
        """Train with A frozen.

        Args:
            client: the client.
            msg: ``model/*`` to start from, without A; ``num_epochs``.
        """
        module, layout = client.model.build(), lora_layout(client.model)
        load_state(module, {**detached_state(module), **msg.group("model")})
        frozen = [place.right_key for place in layout.modules.values()]
        for key in frozen:
            module.get_parameter(key).requires_grad_(False)
        upload = trained_upload(module, client, self.local, msg)
        for key in frozen:
            del upload[f"model/{key}"]
        return upload

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Average B, send it, and again.

        Args:
            cohort: the clients.
            job: the common model.
        """
        check_homogeneous(job)
        adapters = ClientAdapters.of(job, self.name)
        frozen = {f"model/{place.right_key}" for place in adapters.common.modules.values()}
        expect = {key: value for key, value in model_expectation(job.model).items() if key not in frozen}
        mean: dict[str, Tensor] = {}
        for number in range(self.num_rounds):
            message = Payload({"num_epochs": self.local.share(number, self.num_rounds)}).put_group("model", mean)
            replies = cohort.ask(self.train_left, message, key=f"left_{number}", expect=expect)
            mean = fuse_uploads(replies.uploads(), Mean(), example_weights(replies))
        return Fused(model=Artifact.of(job.model, {**first_weights(job.model), **mean}))
