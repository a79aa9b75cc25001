"""DP-SGD: local training in which no single example can be found again, by opacus."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.errors import ConfigError, TaskError
from fedfuse.core.examples import Examples
from fedfuse.core.seeding import Rng
from fedfuse.data.augment import augment_batch

if TYPE_CHECKING:
    from fedfuse.training.sgd import LocalSGD

_WHERE = "method.local.privacy"
_TOLERANCE = 0.01
"""By how much of a target less may be spent: the search for the noise stops there."""


@dataclass(frozen=True, kw_only=True)
class PrivateTraining:
    """How gradients are clipped and noised, one example at a time.

    Abadi et al., CCS 2016, algorithm 1. Every step draws each example with the same probability, so that a batch has
    ``batch_size`` examples on average. The guarantee is for one training example of the client added or removed.

    Args:
        max_grad_norm: largest L2 norm of one example's gradient, above 0.
        noise_multiplier: noise of the summed gradient in units of ``max_grad_norm``, above 0; or
        epsilon: instead, what the client's training may spend in the whole run; exchanges share it by their epochs.
        delta: of each exchange that trains; well below one over the client's number of examples.
        accountant: ``rdp``, or ``prv``, which is tighter and takes longer.
    """

    max_grad_norm: float = 1.0
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float = 1e-5
    accountant: Literal["rdp", "prv"] = "rdp"

    def __post_init__(self) -> None:
        if (self.noise_multiplier is None) == (self.epsilon is None):
            raise ConfigError(
                "the noise is not determined", where=_WHERE, fix="give either noise_multiplier or epsilon"
            )
        for name in ("max_grad_norm", "noise_multiplier", "epsilon"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"{name} is {value:g}", where=f"{_WHERE}.{name}", fix="give a number above 0")
        if not 0 < self.delta < 1:
            raise ConfigError(f"delta is {self.delta:g}", where=f"{_WHERE}.delta", fix="give a number between 0 and 1")


def train_privately(
    module: nn.Module,
    examples: Examples,
    settings: LocalSGD,
    rates: list[float],
    *,
    rng: Rng,
    device: torch.device,
    num_epochs: int,
    augment: str,
    progress: Callable[[int, int], None],
) -> dict[str, Tensor]:
    """Train a module in place by DP-SGD with cross-entropy.

    Args:
        module: maps ``(n, *input_shape)`` to logits ``(n, num_classes)``.
        examples: the training part.
        settings: how; ``settings.privacy`` is set.
        rates: learning rate of every step.
        rng: which examples are drawn and the noise come from its private keys.
        device: where.
        num_epochs: of this exchange.
        augment: name of the augmentation.
        progress: called with (epochs done, epochs in all).

    Returns:
        One value, ``epsilon``: what this training spent. Losses would tell of the data, so none is given.

    Raises:
        TaskError: the model cannot be trained so.
    """
    privacy = settings.privacy
    assert privacy is not None
    sample_rate = min(1.0, settings.batch_size / len(examples))
    sigma = _noise_multiplier(privacy, sample_rate, len(rates), num_epochs / settings.num_epochs)
    module.to(device=device).train()
    x, y = examples.x.to(device), examples.y.to(device)
    sampling = _generator(rng, "examples", torch.device("cpu"))
    draw = _generator(rng, "augment", torch.device("cpu"))
    per_epoch = len(rates) // num_epochs
    buffers = [buffer.clone() for buffer in module.buffers()]
    with _private_gradients(module):
        optimizer = _optimizer(module, settings, privacy, sigma, sample_rate * len(examples), rng, device)
        for step, rate in enumerate(rates, start=1):
            optimizer.param_groups[0]["lr"] = rate
            index = (torch.rand(len(examples), generator=sampling) < sample_rate).nonzero().squeeze(1).to(device)
            optimizer.zero_grad(set_to_none=True)
            if len(index):
                batch = augment_batch(augment, x[index], draw) if augment != "none" else x[index]
                F.cross_entropy(module(batch).float(), y[index]).backward()
            else:
                # Nobody was drawn: the noise alone must not tell.
                for parameter in optimizer.params:
                    parameter.grad_sample = parameter.new_zeros((0, *parameter.shape))
            optimizer.step()
            if step % per_epoch == 0:
                progress(step // per_epoch, num_epochs)
        optimizer.zero_grad(set_to_none=True)
    if not all(torch.equal(old, new) for old, new in zip(buffers, module.buffers(), strict=True)):
        raise TaskError(
            "the model's buffers changed while it was trained, and no noise covers them",
            where=_WHERE,
            fix="use layers that keep no statistics of the data, such as model.norm: group",
        )
    module.to(device="cpu")
    return {"epsilon": torch.tensor([training_epsilon(privacy, sigma, sample_rate, len(rates))])}


@cache
def training_epsilon(privacy: PrivateTraining, noise_multiplier: float, sample_rate: float, num_steps: int) -> float:
    """What DP-SGD spends in one exchange, by opacus.

    Args:
        privacy: delta and accountant.
        noise_multiplier: of every step.
        sample_rate: probability that an example is drawn for a step, in (0, 1].
        num_steps: how many.

    Returns:
        Epsilon.
    """
    accountant = _opacus("accountants").create_accountant(mechanism=privacy.accountant)
    accountant.history = [(noise_multiplier, sample_rate, num_steps)]
    with warnings.catch_warnings():
        # The order of the best bound may lie at the end of those that are tried; the bound holds all the same.
        warnings.simplefilter("ignore")
        return float(accountant.get_epsilon(delta=privacy.delta))


@cache
def _noise_multiplier(privacy: PrivateTraining, sample_rate: float, num_steps: int, share: float) -> float:
    if privacy.noise_multiplier is not None:
        return privacy.noise_multiplier
    assert privacy.epsilon is not None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: float = _opacus("accountants.utils").get_noise_multiplier(
            target_epsilon=privacy.epsilon * share,
            target_delta=privacy.delta,
            sample_rate=sample_rate,
            steps=num_steps,
            accountant=privacy.accountant,
            epsilon_tolerance=_TOLERANCE * privacy.epsilon * share,
        )
    return found


def _generator(rng: Rng, name: str, device: torch.device) -> torch.Generator:
    generator = torch.Generator(device=device)
    generator.manual_seed(int.from_bytes(rng.private_key("dp-sgd", name)[:8], "big") >> 1)
    return generator


def _optimizer(
    module: nn.Module,
    settings: LocalSGD,
    privacy: PrivateTraining,
    sigma: float,
    mean_batch_size: float,
    rng: Rng,
    device: torch.device,
) -> Any:
    sgd = torch.optim.SGD(
        [p for p in module.parameters() if p.requires_grad],
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )
    return _opacus("optimizers").DPOptimizer(
        sgd,
        noise_multiplier=sigma,
        max_grad_norm=privacy.max_grad_norm,
        expected_batch_size=mean_batch_size,
        generator=_generator(rng, "noise", device),
    )


@contextmanager
def _private_gradients(module: nn.Module) -> Iterator[None]:
    """Opacus's hooks, which compute the gradient of every example, for a while."""
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules()):
        raise TaskError(
            "BatchNorm mixes the examples of a batch, so no example's gradient can be bounded",
            where=_WHERE,
            fix="set model.norm: group",
        )
    problems = _opacus("validators").ModuleValidator.validate(module, strict=False)
    try:
        if problems:
            raise problems[0]
        hooks = _opacus("grad_sample.grad_sample_module").GradSampleHooks(module)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        raise TaskError(
            f"opacus cannot train this model privately: {' '.join(str(error).split())}",
            where=_WHERE,
            fix="use another model, or privacy.mechanism: local, which takes any",
        ) from None
    try:
        with warnings.catch_warnings():
            # Torch tells that the inputs of the first layer need no gradient; they do not.
            warnings.filterwarnings("ignore", message="Full backward hook is firing")
            yield
    finally:
        hooks.cleanup()
        for parameter in module.parameters():
            vars(parameter).pop("summed_grad", None)


def check_trains_privately(settings: LocalSGD, *, has_own_loss: bool) -> None:
    """Refuse what would make the guarantee of private training untrue.

    Args:
        settings: how a client trains; ``settings.privacy`` is set.
        has_own_loss: whether the method's loss is more than cross-entropy.

    Raises:
        TaskError: the method adds terms to the loss, which no example's gradient shows.
    """
    if has_own_loss:
        raise TaskError(
            "this method's loss has terms that belong to no single example, so it cannot be trained privately",
            where=_WHERE,
            fix="use a method whose clients train by plain cross-entropy, or privacy.mechanism: local",
        )
    refused = {
        "optimizer": (settings.optimizer != "sgd", "private training is stochastic gradient descent"),
        "patience": (settings.patience is not None, "early stopping looks at the data without noise"),
        "grad_clip_norm": (settings.grad_clip_norm is not None, "private training clips every example already"),
        "precision": (settings.precision != "fp32", "gradients of single examples are computed in fp32"),
        "compile": (settings.compile, "gradients of single examples cannot be compiled"),
    }
    for name, (is_set, reason) in refused.items():
        if is_set:
            raise TaskError(reason, where=f"method.local.{name}", fix=f"leave {name} out, or leave privacy out")


def _opacus(module: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return importlib.import_module(f"opacus.{module}")
    except ImportError:
        raise ConfigError("private training needs opacus", where=_WHERE, fix='pip install "fedfuse[privacy]"') from None
