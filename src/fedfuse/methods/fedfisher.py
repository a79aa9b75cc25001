"""Fusion of weights by their Fisher information."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from fedfuse.core.artifact import Artifact, load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError
from fedfuse.core.expecting import Expectation, TensorSpec
from fedfuse.core.method import Fused, Job, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.fedavg import check_homogeneous
from fedfuse.methods.regmean import check_num_samples, layer_key, sample, stacked
from fedfuse.methods.tasks import LocalTraining, mean_of_those, own_models
from fedfuse.models.foundation import is_foundation
from fedfuse.ops.curvature import Labels, diagonal_merge, kronecker_merge, logit_gradients
from fedfuse.ops.moments import pack_symmetric, unpack_symmetric
from fedfuse.training.capturing import curvature, dense_layers, matrix_of, put_matrix


@register_method("fedfisher", paper="https://arxiv.org/abs/2403.12329", reference="Jhunjhunwala et al., AISTATS 2024")
@dataclass(frozen=True, kw_only=True)
class FedFisher(LocalTraining):
    """Each weight is decided by the clients whose data hold it, as their Fisher information says.

    Jhunjhunwala et al., AISTATS 2024, algorithm 1: the fused weights minimise ``sum p_i (w - w_i)' F_i (w - w_i)``,
    where ``F_i`` is a diagonal or, for each layer, a Kronecker product (K-FAC).

    Exchanges: ``local_models``; ``fisher``, which sends each client its own model back and gets the Fisher
    information. A deployment would join the two; apart, the first stays the question that other methods ask too.

    Departures: the quadratic is solved exactly (in closed form, or by conjugate gradients from the mean), with a
    damping towards the mean; the published code runs Adam from the mean, stops by pooled training data, and computes
    Fisher information in training mode, where here BatchNorm uses its running statistics. Parameters outside of linear
    and convolutional layers get a diagonal; buffers are averaged.

    Args:
        local: how clients train.
        fisher: ``diagonal``, or ``kfac``: two factors per linear and convolutional layer.
        labels: whose labels the gradients are for: ``all`` classes as probable as the model finds them, which is
            exact; one ``sampled`` from the model's answer; or the ``true`` ones, the empirical Fisher.
        damping: pull to the mean, relative to the layer's mean Fisher information, 0 or more.
        num_samples: most training examples that a client looks at, drawn at random; ``None`` is all.
    """

    takes_heterogeneous: ClassVar[bool] = False

    fisher: Literal["diagonal", "kfac"] = "kfac"
    labels: Labels = "all"
    damping: float = 0.1
    num_samples: int | None = None

    def __post_init__(self) -> None:
        if not self.damping >= 0:
            raise ConfigError(f"damping is {self.damping}", where="method.damping", fix="give 0 or more")
        check_num_samples(self.num_samples)

    @client_task(
        uploads={
            "diagonal/*": "mean squared gradient of each parameter",
            "inputs/*": "second moments of a layer's inputs; a bias counts as an input of 1",
            "gradients/*": "second moments of the gradients of a layer's outputs",
        },
        settings=("fisher", "labels", "num_samples"),
    )
    def fisher_information(self, client: Client, msg: Payload) -> Payload:
        """Fisher information of the client's model on its training examples.

        Args:
            client: the client.
            msg: ``model/*``, the client's own model.
        """
        module = client.model.build()
        load_state(module, msg.group("model"))
        chosen = client.data.train.subset(sample(client, self.num_samples))

        def gradients(logits: Tensor, index: Tensor) -> Tensor:
            draw = client.rng.torch("labels", int(index[0]))
            return logit_gradients(logits, chosen.y[index].to(logits.device), self.labels, draw)

        found = curvature(
            module,
            chosen.x,
            list(dense_layers(module, client.model.example_input())),
            gradients,
            device=client.device,
            kronecker=self.fisher == "kfac",
            progress=client.progress,
        )
        upload = Payload().put_group("diagonal", {name: t.float() for name, t in found.diagonal.items()})
        for group, factors in (("inputs", found.inputs), ("gradients", found.gradients)):
            upload.put_group(group, {layer_key(n): pack_symmetric(t).float() for n, t in factors.items()})
        return upload

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Collect models and Fisher information, solve tensor by tensor.

        Args:
            cohort: the clients.
            job: the common model.
        """
        check_homogeneous(job)
        if is_foundation(job.model):
            raise ConfigError(
                "the Fisher information of a foundation model is not computed",
                where="method.name",
                fix="use a method for adapters, such as fedit, flora or regmean",
            )
        replies = self.local_models(cohort, job)
        first = job.model.build()
        layers = list(dense_layers(first, job.model.example_input())) if self.fisher == "kfac" else []
        names = [name for name, _ in first.named_parameters() if _layer_of(name) not in layers]
        own = own_models(replies)
        expect = _expectation(first, layers, names)
        answers = cohort.ask(self.fisher_information, own, key="fisher", expect=expect)
        shares, state = mean_of_those(replies, answers)
        opened = answers.uploads()
        for name in names:
            values = torch.stack([own[c].tensor(f"model/{name}").double() for c in answers])
            fishers = stacked(opened, f"diagonal/{name}").clamp(min=0)
            state[name] = diagonal_merge(values, fishers, shares, self.damping).to(state[name].dtype)
        for done, name in enumerate(layers):
            values = torch.stack([matrix_of(own[c].group("model"), name).double() for c in answers])
            d_out, d_in = values.shape[1:]
            inputs = unpack_symmetric(stacked(opened, f"inputs/{layer_key(name)}"), d_in)
            gradients = unpack_symmetric(stacked(opened, f"gradients/{layer_key(name)}"), d_out)
            put_matrix(state, name, kronecker_merge(values, inputs, gradients, shares, self.damping))
            job.progress("solving layers", done + 1, len(layers))
        return Fused(model=Artifact.of(job.model, state))


def _layer_of(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _expectation(module: nn.Module, layers: list[str], names: list[str]) -> Expectation:
    state = module.state_dict()
    expect: dict[str, TensorSpec] = {f"diagonal/{name}": TensorSpec(tuple(state[name].shape)) for name in names}
    for name in layers:
        for group, d in zip(("gradients", "inputs"), matrix_of(state, name).shape, strict=True):
            expect[f"{group}/{layer_key(name)}"] = TensorSpec((d * (d + 1) // 2,))
    return expect
