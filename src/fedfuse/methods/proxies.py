"""What methods share that send the ensemble back and learn how to combine it on the clients' validation parts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fedfuse.core.artifact import Artifact, build, detached_state, load_state
from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import DataError
from fedfuse.core.method import Fused, Job, client_task
from fedfuse.core.payload import Payload
from fedfuse.methods.tasks import LocalTraining, check_classifiers, client_artifact
from fedfuse.models.combined import Combined
from fedfuse.ops.quantize import pack_int8, unpack_int8
from fedfuse.training import predict


@dataclass(frozen=True, kw_only=True)
class ProxyEnsemble(LocalTraining):
    """Methods that combine all clients' models by what these do on proxy data: the clients' validation parts.

    Args:
        local: how clients train.
        quantize: send the models to the clients in int8, and keep them so rounded.
    """

    quantize: bool = False

    @client_task(uploads={"num_proxy": "number of examples in the client's validation part"}, settings=(), state=True)
    def keep_logits(self, client: Client, msg: Payload) -> Payload:
        """Run all models on the client's validation part and keep what they say; none of it leaves the client.

        Args:
            client: the client; its state gets the logits.
            msg: the ensemble, as :meth:`collect` packs it.
        """
        client.state["proxy/logits"] = proxy_logits(client, msg)
        return Payload({"num_proxy": len(client.data.validation)})

    def collect(self, cohort: Cohort, job: Job) -> tuple[list[Artifact], Payload]:
        """All clients' models, and the message that brings them to every client.

        Args:
            cohort: the clients.
            job: says which model each client owns.

        Returns:
            The models as they are served, and the message.
        """
        check_classifiers(job)
        replies = self.local_models(cohort, job)
        artifacts, message = [], Payload({"num_members": len(replies)})
        for position, client_id in enumerate(replies):
            artifact = client_artifact(job, client_id, replies[client_id])
            if self.quantize:
                tensors, scales = pack_int8(artifact.state)
                message.put_group(f"scales/{position}", scales)
                # What is served must be what the combiner was made for.
                artifact = replace(artifact, state=unpack_int8(tensors, scales))
            else:
                tensors = dict(artifact.state)
            message.put_group(f"members/{position}", tensors)
            artifacts.append(artifact)
        if job.client_models:
            message["recipes"] = json.dumps([artifact.recipe for artifact in artifacts])
        return artifacts, message

    def logits_at_clients(self, cohort: Cohort, job: Job, message: Payload) -> dict[str, float]:
        """Have every client run the ensemble on its validation part once.

        Args:
            cohort: the clients.
            job: where clients without such a part are told.
            message: the ensemble.

        Returns:
            Client id to its number of proxy examples, of those that have any.
        """
        replies = cohort.ask(self.keep_logits, message, key="proxy_logits", expect={"num_proxy": int})
        return with_proxies(replies.numbers("num_proxy"), job)


def proxy_logits(client: Client, msg: Payload) -> Tensor:
    """What all models of an ensemble say of a client's validation part; one model at a time is in memory.

    Args:
        client: whose validation part.
        msg: the ensemble, as :meth:`ProxyEnsemble.collect` packs it.

    Returns:
        Shape ``(n, num_members, num_classes)``, float32.
    """
    num_members, proxies = int(msg.number("num_members")), client.data.validation
    if not len(proxies):
        return torch.zeros(0, num_members, client.data.num_classes)
    recipes = json.loads(msg.text("recipes")) if "recipes" in msg else []
    answers = []
    for position in range(num_members):
        module = build(recipes[position]) if recipes else client.model.build()
        load_state(module, unpack_int8(msg.group(f"members/{position}"), msg.group(f"scales/{position}")))
        answers.append(predict(module, proxies.x, device=client.device))
        client.progress(position + 1, num_members)
    return torch.stack(answers, 1)


def with_proxies(numbers: dict[str, float], job: Job) -> dict[str, float]:
    """Those clients that have proxy data.

    Args:
        numbers: client id to its number of proxy examples.
        job: where the others are told.

    Returns:
        Client id to number, in client-id order.

    Raises:
        DataError: none has any.
    """
    having = {client_id: number for client_id, number in numbers.items() if number > 0}
    if not having:
        raise DataError(
            "no client has validation data to learn on how to combine the models",
            where="data.validation_fraction",
            fix="set it above 0, or use the method ensemble",
        )
    if len(having) < len(numbers):
        without = ", ".join(client_id for client_id in numbers if client_id not in having)
        job.note(f"Without validation data, and without a say in how the models are combined: {without}.")
    return having


def serve(artifacts: Sequence[Artifact], combiner: nn.Module) -> Fused:
    """The result: all models and what combines them.

    Args:
        artifacts: the models.
        combiner: maps all their logits to one answer.
    """
    members = [artifact.module() for artifact in artifacts]
    net = Combined(members, combiner, recipes=[artifact.recipe for artifact in artifacts])
    is_opaque = any(artifact.template is not None for artifact in artifacts)
    return Fused(model=Artifact(net.recipe, detached_state(net), template=net if is_opaque else None))
