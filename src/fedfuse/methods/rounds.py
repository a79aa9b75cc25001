"""What methods with many rounds share beyond FedAvg."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fedfuse.core.artifact import ModelSpec, detached_state
from fedfuse.core.cohort import Cohort, Replies
from fedfuse.core.errors import ConfigError
from fedfuse.core.expecting import Expectation
from fedfuse.core.method import Job, Task
from fedfuse.core.payload import Payload
from fedfuse.methods.fedavg import FedAvg
from fedfuse.methods.tasks import model_expectation
from fedfuse.ops.adaptive import AdaptiveStep
from fedfuse.training import LocalSGD

State = Mapping[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Rounds(FedAvg):
    """Base of the baselines whose server, or whose clients, do more than FedAvg's in every round.

    Args:
        local: how clients train.
        num_rounds: rounds, at least 1.
    """

    num_rounds: int = 10

    def ask_round(
        self,
        cohort: Cohort,
        job: Job,
        number: int,
        model: State,
        *,
        task: Task | None = None,
        others: Mapping[str, State] | None = None,
        expect: Expectation | None = None,
    ) -> Replies:
        """Ask all clients to train from the model of a round; where nothing more is asked, it is FedAvg's question.

        Args:
            cohort: the clients.
            job: the common model.
            number: of the round, from 0. In the first the model need not travel: everyone has the first weights.
            model: weights and buffers to start from.
            task: what to ask; plain local training if left out.
            others: more groups of tensors to send, from the second round on.
            expect: what an upload must hold beyond the model.
        """
        plain = task is None
        if plain and self.num_rounds == 1:
            return self.local_models(cohort, job)
        message = Payload({"num_epochs": self.local.share(number, self.num_rounds)})
        if number:
            for group, tensors in {"model": model, **(others or {})}.items():
                message.put_group(group, tensors)
        wanted = {**model_expectation(job.model), **(expect or {})}
        return cohort.ask(task or self.train_local, message, key=f"round_{number}", expect=wanted)


def first_weights(spec: ModelSpec) -> dict[str, Tensor]:
    """Weights and buffers that everyone starts from.

    Args:
        spec: the common model.
    """
    return detached_state(spec.build())


def parameter_names(spec: ModelSpec) -> list[str]:
    """Names of what is trained; the rest of a state dict are buffers.

    Args:
        spec: the common model.

    Returns:
        Names in the module's order; a tied parameter has all of its names.
    """
    module = spec.build()
    # What a foundation model keeps frozen is no part of its state.
    state = module.state_dict()
    return [name for name, _ in module.named_parameters(remove_duplicate=False) if name in state]


def moved(current: State, mean: State, names: list[str], factor: float) -> dict[str, Tensor]:
    """The clients' mean, but with parameters that go ``factor`` times as far.

    Args:
        current: what the clients started from.
        mean: the mean of what came back; its buffers stay.
        names: the parameters.
        factor: 1 is the mean itself.

    Returns:
        A state dict.
    """
    state = dict(mean)
    for name in names:
        start = current[name].double()
        state[name] = (start + factor * (mean[name].double() - start)).to(current[name].dtype)
    return state


def check_counted_steps(local: LocalSGD, method: str) -> None:
    """Refuse early stopping where a method divides by the number of local steps.

    Args:
        local: how clients train.
        method: its name, for the message.

    Raises:
        ConfigError: ``patience`` is set.
    """
    if local.patience is not None:
        raise ConfigError(
            f"{method} divides by the number of local steps, which early stopping hides",
            where="method.local.patience",
            fix="leave patience out",
        )


class AdaptiveServer:
    """An adaptive step with the moments of all tensors.

    Args:
        step: which.
        initial_second: second moment before the first step.
    """

    def __init__(self, step: AdaptiveStep, initial_second: float) -> None:
        self.step, self.initial_second = step, initial_second
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}

    def advance(self, current: Mapping[str, Tensor], mean: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Move weights towards the clients' mean.

        Args:
            current: what the clients started from.
            mean: the mean of what came back; same names, shapes and dtypes.

        Returns:
            Name to new tensor, in the order of ``current``.
        """
        moved = {}
        for name, tensor in current.items():
            change = mean[name].double() - tensor.double()
            known = self.moments.get(name, (torch.zeros_like(change), torch.full_like(change, self.initial_second)))
            step, *moments = self.step(change, *known)
            self.moments[name] = (moments[0], moments[1])
            moved[name] = (tensor.double() + step).to(tensor.dtype)
        return moved
