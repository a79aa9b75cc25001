"""An ensemble with one weight per member, found by Newton's method over the clients' validation parts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError
from fedfuse.core.expecting import TensorSpec
from fedfuse.core.method import Fused, Job, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.methods.proxies import ProxyEnsemble, serve
from fedfuse.models.combined import Weighted
from fedfuse.ops.moments import pack_symmetric, unpack_symmetric
from fedfuse.ops.stacking import stacking_terms

_TOLERANCE = 1e-9


@register_method(
    "linear_weights", paper="https://arxiv.org/abs/2411.07182", reference="as in Allouah et al., NeurIPS 2024"
)
@dataclass(frozen=True, kw_only=True)
class LinearWeights(ProxyEnsemble):
    """A weighted sum of all models' logits, with the weights that fit the clients' validation parts best.

    As compared in Allouah et al., NeurIPS 2024 (linear mapping): K weights that minimise the cross-entropy.

    Exchanges: ``local_models``; ``proxy_logits``: every client gets all models and keeps what they say of its
    validation part; ``weights_0``, ``weights_1``, ...: each sends K weights and uploads the loss, its gradient and its
    Hessian, which add up over clients.

    Departures: the loss is convex in K numbers, so Newton's method finds the very weights that pooled proxy data would
    give, in a few rounds of K (K + 3) / 2 + 1 numbers, where the published code runs 1000 epochs of Adam on pooled
    logits; a ridge holds the weights near the plain mean; there is no bias, because one number added to all logits
    changes no answer.

    Args:
        local: how clients train; with ``patience`` the proxy part also says when to stop.
        quantize: send the models to the clients in int8, and keep them so rounded.
        ridge: pull towards equal weights, relative to the mean loss per example; above 0.
        num_rounds: most rounds of Newton's method, at least 1; it ends when nothing is left to gain.
    """

    ridge: float = 0.01
    num_rounds: int = 20

    def __post_init__(self) -> None:
        if not self.ridge > 0:
            raise ConfigError(f"ridge is {self.ridge}", where="method.ridge", fix="give a number above 0")
        if self.num_rounds < 1:
            raise ConfigError(f"num_rounds is {self.num_rounds}", where="method.num_rounds", fix="give at least 1")

    @client_task(
        uploads={
            "stacking/loss": "summed loss of the weighted ensemble on the validation part",
            "stacking/gradient": "its derivative by the weights",
            "stacking/hessian": "its second derivative, one triangle",
        },
        settings=(),
        state=True,
    )
    def derivatives(self, client: Client, msg: Payload) -> Payload:
        """Loss and derivatives of the weighted ensemble on the client's validation part.

        Args:
            client: the client; its state holds the logits.
            msg: ``weights``.
        """
        logits, labels = client.state.tensor("proxy/logits"), client.data.validation.y
        loss, gradient, hessian = stacking_terms(logits, labels, msg.tensor("weights"))
        triangle = pack_symmetric(hessian)
        return Payload({"stacking/loss": loss, "stacking/gradient": gradient, "stacking/hessian": triangle})

    def fuse(self, cohort: Cohort, job: Job) -> Fused:
        """Collect the models, show them to the clients, and find the weights.

        Args:
            cohort: the clients.
            job: says which model each client owns.
        """
        artifacts, message = self.collect(cohort, job)
        num_proxies = self.logits_at_clients(cohort, job, message)
        num_members = len(artifacts)
        triangle = num_members * (num_members + 1) // 2
        expect = {
            "stacking/loss": TensorSpec((), torch.float64),
            "stacking/gradient": TensorSpec((num_members,), torch.float64),
            "stacking/hessian": TensorSpec((triangle,), torch.float64),
        }
        search = NewtonSearch(torch.full((num_members,), 1 / num_members, dtype=torch.float64), self.ridge)
        for number in range(self.num_rounds):
            sent = Payload({"weights": search.weights})
            replies = cohort.ask(
                self.derivatives, dict.fromkeys(num_proxies, sent), key=f"weights_{number}", expect=expect
            )
            total = sum(num_proxies[client_id] for client_id in replies)
            sums = [
                torch.stack([replies[client_id].tensor(key) for client_id in replies]).sum(0) / total for key in expect
            ]
            if search.learn(sums[0], sums[1], unpack_symmetric(sums[2], num_members)):
                break
        job.facts["member_weights"] = [round(w, 4) for w in search.best.tolist()]
        return serve(artifacts, Weighted(search.best))


class NewtonSearch:
    """Newton's method where each look at the function costs a round; a step that went too far is halved.

    Args:
        start: first weights, and what the ridge pulls towards; shape ``(n,)``, float64.
        ridge: strength of that pull, above 0.
    """

    def __init__(self, start: Tensor, ridge: float) -> None:
        self.start, self.ridge = start, ridge
        self.weights, self.best = start, start
        self._value: float | None = None

    def learn(self, loss: Tensor, gradient: Tensor, hessian: Tensor) -> bool:
        """Take in the function at :attr:`weights` and decide where to look next.

        Args:
            loss: without the ridge, shape ``()``.
            gradient: shape ``(n,)``.
            hessian: shape ``(n, n)``.

        Returns:
            Whether nothing is left to gain.
        """
        offset = self.weights - self.start
        value = float(loss + 0.5 * self.ridge * offset.square().sum())
        if self._value is not None and value > self._value:
            self.weights = (self.weights + self.best) / 2
            return bool((self.weights - self.best).abs().max() < _TOLERANCE)
        self._value, self.best = value, self.weights
        slope = gradient + self.ridge * offset
        step = torch.linalg.solve(hessian + self.ridge * torch.eye(len(slope), dtype=slope.dtype), slope)
        self.weights = self.weights - step
        return bool(slope @ step < _TOLERANCE)
