"""Federated averaging of one large model that weaker clients train in a thin form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.core.artifact import Artifact, load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort, Replies
from fedfuse.core.errors import ConfigError
from fedfuse.core.method import Fused, Job, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.rounds import first_weights
from fedfuse.methods.sizes import OwnSizes, State, all_models, num_values, received
from fedfuse.methods.tasks import MODEL_UPLOADS, example_weights, trained_upload
from fedfuse.models.low_rank import Thin, product_energy
from fedfuse.training import plain_loss


@register_method("fedhm", paper="https://arxiv.org/abs/2111.14655", reference="Yao et al., arXiv 2021")
@dataclass(frozen=True, kw_only=True)
class FedHM(OwnSizes):
    """Everybody trains the largest model, who cannot hold it in a form whose layers are products of two thin ones.

    Yao et al., arXiv 2111.14655: the server makes layers thin by singular values, clients train the factors, and the
    server multiplies them out and averages the products.

    Exchanges: ``num_rounds``; each uploads the client's form of the model. Where all clients own the same model, this
    is FedAvg, and asks its questions.

    Departures: how thin a client's form is follows from the model that it owns: the highest rank, the same fraction in
    every layer, with which the large model holds no more numbers than that. The paper sets the fraction by hand and
    keeps more than the first and the last layer whole. The mean is weighted by examples. A product's rank is cut anew
    after each averaging, also for the models that clients end up with.

    Args:
        local: how clients train; ``local.num_epochs`` is the total over all rounds.
        num_rounds: rounds, at least 1.
        frobenius_decay: weight of the squared norm of the products in the loss of thin models, 0 or more.
    """

    frobenius_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.frobenius_decay >= 0:
            raise ConfigError(
                f"frobenius_decay is {self.frobenius_decay}", where="method.frobenius_decay", fix="give 0 or more"
            )

    @client_task(uploads=MODEL_UPLOADS, settings=("local", "frobenius_decay"))
    def train_thin(self, client: Client, msg: Payload) -> Payload:
        """Train the client's form of the large model and upload it.

        Args:
            client: the client.
            msg: ``recipe`` and ``seed`` of that form, ``num_epochs``; ``model/*`` to start from, but for those who hold
                the first weights already.
        """
        spec = received(client, msg)
        module, start = spec.build(), msg.group("model")
        if start:
            load_state(module, start)
        ranks, decay = spec.recipe.get("ranks", {}), self.frobenius_decay
        if not (ranks and decay):
            return trained_upload(module, client, self.local, msg)

        def loss(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
            return plain_loss(net, x, y) + decay / 2 * product_energy(net, ranks)

        return trained_upload(module, client, self.local, msg, loss)

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Make the large model thin, let clients train, multiply out, average, and again.

        Args:
            cohort: the clients.
            job: says which model each client owns; the one that holds the most numbers is the large one.
        """
        specs = all_models(job)
        large, is_common = specs[-1], len(specs) == 1
        by_size = {spec.digest: Thin.of(large, num_values(spec)) for spec in specs}
        forms = {client_id: by_size[job.model_of(client_id).digest] for client_id in cohort.client_ids}
        if any(num_values(by_size[spec.digest].thin_spec) > num_values(spec) for spec in specs):
            job.note("a client's own model is smaller than the thinnest form of the largest, which it was given")
        job.facts["ranks"] = {c: dict(form.ranks) for c, form in forms.items()}
        whole: State = first_weights(large)
        for number in range(self.num_rounds):
            if is_common:
                starts: Mapping[str, State] = dict.fromkeys(forms, whole if number else {})
                replies = self.ask_models(cohort, job, number, starts)
            else:
                made = {digest: form.factorised(whole) for digest, form in by_size.items()}
                # In the first round, who trains the large model as it is has its weights already.
                sent = [c for c, form in forms.items() if number or form.ranks or large.initial]
                replies = self.ask_models(
                    cohort,
                    job,
                    number,
                    {c: made[job.model_of(c).digest] for c in sent},
                    task=self.train_thin,
                    specs={c: form.thin_spec for c, form in forms.items()},
                )
            whole = multiplied_out(whole, replies, forms)
        if is_common:
            return Fused(model=Artifact.of(large, whole))
        made = {digest: form.factorised(whole) for digest, form in by_size.items()}
        return Fused(
            personal={c: Artifact.of(form.thin_spec, made[job.model_of(c).digest]) for c, form in forms.items()}
        )


def multiplied_out(whole: State, replies: Replies, forms: Mapping[str, Thin]) -> dict[str, Tensor]:
    """The mean of the clients' models with thin layers multiplied out, read one tensor at a time.

    Args:
        whole: the large model as it was.
        replies: uploads with ``model/*`` and ``num_examples``.
        forms: client id to its form.
    """
    weights = example_weights(replies)
    shares = torch.tensor(weights, dtype=torch.float64) / sum(weights)
    states = [_Model(upload) for upload in replies.uploads()]
    found = {}
    for name, tensor in whole.items():
        parts = [forms[c].composed(name, state).double() for c, state in zip(replies, states, strict=True)]
        mean = torch.stack([share * part for share, part in zip(shares, parts, strict=True)]).sum(0)
        found[name] = (mean if tensor.is_floating_point() else mean.round()).to(tensor.dtype)
    return found


class _Model(dict[str, Tensor]):
    """The model in an upload, each tensor read when it is looked at."""

    def __init__(self, upload: Mapping[str, Any]) -> None:
        super().__init__()
        self._upload = upload

    def __missing__(self, name: str) -> Tensor:
        found: Tensor = self._upload[f"model/{name}"]
        return found
