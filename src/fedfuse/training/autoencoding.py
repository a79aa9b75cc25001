"""Train autoencoders by Adam."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedfuse.core.errors import ConfigError
from fedfuse.core.examples import Examples
from fedfuse.core.seeding import Rng
from fedfuse.models.autoencoder import Autoencoder, ConditionalDecoder, ConditionalEncoder
from fedfuse.ops.variational import gaussian_kl, reconstruction_loss
from fedfuse.training.distillation import check_loss
from fedfuse.training.sgd import batches

Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Autoencoding:
    """How an autoencoder is trained and how large it is.

    Args:
        num_epochs: passes over the data, at least 1.
        batch_size: examples per step, at least 2.
        learning_rate: of Adam, above 0.
        latent_size: length of a latent vector, at least 1.
        width: channels of the convolutions that are nearest to the image, at least 1.
        kl_weight: of the divergence of a variational one, 0 or more; 1 is the evidence lower bound.
    """

    num_epochs: int = 40
    batch_size: int = 32
    learning_rate: float = 2e-3
    latent_size: int = 10
    width: int = 32
    kl_weight: float = 1.0

    def __post_init__(self) -> None:
        limits = {"num_epochs": 1, "batch_size": 2, "latent_size": 1, "width": 1, "kl_weight": 0}
        for name, least in limits.items():
            if not getattr(self, name) >= least:
                raise ConfigError(
                    f"{name} is {getattr(self, name)}", where=f"autoencoding.{name}", fix=f"give at least {least}"
                )
        if not self.learning_rate > 0:
            raise ConfigError(
                f"learning_rate is {self.learning_rate}",
                where="autoencoding.learning_rate",
                fix="give a number above 0",
            )


def descend(
    modules: nn.Module,
    num_examples: int,
    settings: Autoencoding,
    loss: Callable[[Tensor, torch.Generator], Tensor],
    *,
    rng: Rng,
    progress: Progress = lambda done, total: None,
) -> Tensor:
    """Minimise a loss over batches of positions.

    Args:
        modules: trained in place.
        num_examples: positions go from 0 to this.
        settings: how.
        loss: ``(positions, draw)`` to a scalar.
        rng: decides order and noise.
        progress: called with (epochs done, epochs in all).

    Returns:
        The mean loss of each epoch, shape ``(num_epochs,)``.
    """
    optimizer = torch.optim.Adam(modules.parameters(), lr=settings.learning_rate, fused=True)
    modules.train()
    curve = []
    for epoch in range(settings.num_epochs):
        draw, total, num_steps = rng.torch("noise", epoch), torch.zeros(()), 0
        for index in batches(num_examples, settings.batch_size, rng.torch("shuffle", epoch)):
            value = loss(index, draw)
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            total, num_steps = total + value.detach().cpu(), num_steps + 1
        check_loss(float(total), "autoencoding")
        curve.append(float(total) / num_steps)
        progress(epoch + 1, settings.num_epochs)
    modules.eval()
    return torch.tensor(curve)


def negative_elbo(
    encoder: ConditionalEncoder,
    decoder: ConditionalDecoder,
    x: Tensor,
    labels: Tensor,
    noise: Tensor,
    kl_weight: float = 1.0,
) -> Tensor:
    """The negative evidence lower bound of each example, with one draw of its latent vector.

    Args:
        encoder: the Gaussian over latent vectors.
        decoder: the likelihood of inputs.
        x: raw inputs, shape ``(n, *input_shape)``.
        labels: shape ``(n,)``.
        noise: standard normal numbers, shape ``(n, latent_size)``.
        kl_weight: of the divergence.

    Returns:
        Shape ``(n,)``.
    """
    mean, log_variance = encoder(x, labels)
    decoded = decoder.parameters_of(mean + (0.5 * log_variance).exp() * noise, labels)
    loss = reconstruction_loss(decoded, x, is_pixels=decoder.is_pixels)
    return loss + kl_weight * gaussian_kl(mean, log_variance)


def train_conditional(
    encoder: ConditionalEncoder,
    decoder: ConditionalDecoder,
    examples: Examples,
    settings: Autoencoding,
    *,
    rng: Rng,
    device: torch.device,
    progress: Progress = lambda done, total: None,
) -> Tensor:
    """Train a conditional variational autoencoder in place.

    Args:
        encoder: the Gaussian over latent vectors.
        decoder: the likelihood of inputs.
        examples: raw inputs and labels.
        settings: how.
        rng: decides order and noise.
        device: where.
        progress: called with (epochs done, epochs in all).

    Returns:
        The negative evidence lower bound after each epoch.
    """
    both = nn.ModuleList([encoder, decoder]).to(device)
    x, y = examples.x.to(device), examples.y.to(device)

    def loss(index: Tensor, draw: torch.Generator) -> Tensor:
        noise = torch.randn(len(index), decoder.latent_size, generator=draw).to(device)
        index = index.to(device)
        return negative_elbo(encoder, decoder, x[index], y[index], noise, settings.kl_weight).mean()

    curve = descend(both, len(examples), settings, loss, rng=rng, progress=progress)
    both.cpu()
    return curve


def train_autoencoder(
    x: Tensor,
    settings: Autoencoding,
    *,
    is_pixels: bool,
    rng: Rng,
    device: torch.device | str = "cpu",
    progress: Progress = lambda done, total: None,
) -> Autoencoder:
    """Train an autoencoder on inputs of one's own, for the methods that take one.

    Args:
        x: raw inputs, shape ``(n, *input_shape)``.
        settings: how; ``kl_weight`` is not used.
        is_pixels: whether they are in [0, 1].
        rng: decides weights and order.
        device: where.
        progress: called with (epochs done, epochs in all).

    Returns:
        The autoencoder on the CPU; ``Artifact(net.recipe, net.state_dict()).save(folder)`` keeps it.
    """
    with rng.ambient("weights"):
        net = Autoencoder(
            tuple(x.shape[1:]), latent_size=settings.latent_size, width=settings.width, is_pixels=is_pixels
        )
    net.to(device)

    def loss(index: Tensor, draw: torch.Generator) -> Tensor:
        batch = x[index].to(device)
        decoded = net.decoder(net.encode(batch))
        return reconstruction_loss(decoded, batch, is_pixels=is_pixels).mean()

    descend(net, len(x), settings, loss, rng=rng, progress=progress)
    return net.cpu()
