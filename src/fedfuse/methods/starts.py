"""Where clients start from: the common first weights, or each from a draw of its own."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from fedfuse.core.client import Client
from fedfuse.core.cohort import Cohort, Replies
from fedfuse.core.errors import ConfigError
from fedfuse.core.method import Job, client_task
from fedfuse.core.payload import Payload
from fedfuse.core.seeding import derive_seed
from fedfuse.methods.tasks import MODEL_UPLOADS, LocalTraining, model_expectation, trained_upload


@dataclass(frozen=True, kw_only=True)
class LocalStarts(LocalTraining):
    """Methods that also fuse models which were trained from different first weights.

    Args:
        local: how clients train.
        first_weights: ``common`` to all clients, or each client's ``own``.
    """

    first_weights: Literal["common", "own"] = "common"

    @client_task(uploads=MODEL_UPLOADS, settings=("local",))
    def train_own(self, client: Client, msg: Payload) -> Payload:
        """Train from first weights that no other client has.

        Args:
            client: the client.
            msg: may hold ``num_epochs`` instead of the settings'.
        """
        seed = derive_seed(client.model.seed, "own first weights", client.id)
        module = dataclasses.replace(client.model, seed=seed).build()
        return trained_upload(module, client, self.local, msg)

    def started_models(self, cohort: Cohort, job: Job, num_exchanges: int = 1) -> Replies:
        """Ask all clients for their locally trained models.

        With common first weights and one exchange this is the question that every one-round method asks.

        Args:
            cohort: the clients.
            job: says which model each client owns.
            num_exchanges: exchanges that share the local epochs, of which this is the first.

        Raises:
            ConfigError: clients shall draw first weights, but the model has weights of its own.
        """
        is_own = self.first_weights == "own"
        if is_own and any(m.initial or m.template is not None for m in (job.model, *job.client_models.values())):
            raise ConfigError(
                "the model comes with its weights, so clients cannot draw their own",
                where="method.first_weights",
                fix="use first_weights: common, or a model of a family",
            )
        if not is_own and num_exchanges == 1:
            return self.local_models(cohort, job)
        message = Payload() if num_exchanges == 1 else Payload({"num_epochs": self.local.share(0, num_exchanges)})
        return cohort.ask(
            self.train_own if is_own else self.train_local,
            message,
            key="own_models" if is_own else "layers_0",
            expect=lambda client_id: model_expectation(job.model_of(client_id)),
        )
