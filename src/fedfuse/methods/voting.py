"""An ensemble whose votes count by the confusion matrices of its members."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError
from fedfuse.core.expecting import TensorSpec
from fedfuse.core.method import Fused, Job, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.proxies import ProxyEnsemble, proxy_logits, serve, with_proxies
from fedfuse.models.combined import Polychotomous
from fedfuse.ops.stacking import confusion_counts, log_likelihoods


@register_method("voting", paper="https://arxiv.org/abs/2411.07182", reference="as in Allouah et al., NeurIPS 2024")
@dataclass(frozen=True, kw_only=True)
class Voting(ProxyEnsemble):
    """Polychotomous voting: the class under which all members' predictions are likeliest together.

    As compared in Allouah et al., NeurIPS 2024: score(i) = product over members of P_k(what k predicts | i), with P_k
    from k's confusion matrix on data that no model was trained on.

    Exchanges: ``local_models``; ``confusions``: every client gets all models and uploads their confusion matrices on
    its validation part. The server uses their sum only.

    Departures: rows of P_k are smoothed, so that no product is zero by chance, and a class that nobody has seen says
    nothing.

    Args:
        local: how clients train; with ``patience`` the proxy part also says when to stop.
        quantize: send the models to the clients in int8, and keep them so rounded.
        smoothing: examples that are added to each row of a confusion matrix, spread evenly; above 0.
    """

    smoothing: float = 1.0

    def __post_init__(self) -> None:
        if not self.smoothing > 0:
            fix = "give a number above 0"
            raise ConfigError(f"smoothing is {self.smoothing}", where="method.smoothing", fix=fix)

    @client_task(
        uploads={
            "confusion": "counts of (model, true class, predicted class) on the client's validation part",
            "num_proxy": "number of examples in that part",
        },
        settings=(),
    )
    def confusions(self, client: Client, msg: Payload) -> Payload:
        """Confusion matrices of all models on the client's validation part.

        Args:
            client: the client.
            msg: the ensemble.
        """
        proxies = client.data.validation
        return Payload({"confusion": confusion_counts(proxy_logits(client, msg), proxies.y), "num_proxy": len(proxies)})

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Collect the models, and how they confuse classes.

        Args:
            cohort: the clients.
            job: says which model each client owns.
        """
        artifacts, message = self.collect(cohort, job)
        num_classes = job.model.num_classes
        expect = {"confusion": TensorSpec((len(artifacts), num_classes, num_classes), torch.int32), "num_proxy": int}
        replies = cohort.ask(self.confusions, message, key="confusions", expect=expect)
        having = with_proxies(replies.numbers("num_proxy"), job)
        counts = torch.stack([replies[client_id].tensor("confusion") for client_id in having]).sum(0)
        return serve(artifacts, Polychotomous(log_likelihoods(counts, self.smoothing)))
