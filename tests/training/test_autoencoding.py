"""Training of autoencoders."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError
from fedfuse.core.examples import Examples
from fedfuse.core.seeding import Rng
from fedfuse.models.autoencoder import ConditionalDecoder, ConditionalEncoder
from fedfuse.training.autoencoding import Autoencoding, negative_elbo, train_autoencoder, train_conditional

SMALL = Autoencoding(num_epochs=40, batch_size=8, latent_size=2, width=4)


def stripes() -> Examples:
    """Columns are class 0, rows are class 1."""
    x = torch.zeros(32, 1, 8, 8)
    x[:16, :, :, ::2] = 1
    x[16:, :, ::2] = 1
    return Examples(x, torch.arange(32) // 16)


def parts(*, is_pixels: bool = True) -> tuple[ConditionalEncoder, ConditionalDecoder]:
    facts = {"num_classes": 2, "latent_size": 2, "width": 4}
    with Rng(0).ambient("weights"):
        return ConditionalEncoder((1, 8, 8), **facts), ConditionalDecoder((1, 8, 8), **facts, is_pixels=is_pixels)


def zeroed(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()


def test_the_bound_of_a_network_that_says_nothing() -> None:
    # Mean 0 and variance 1 have no divergence; a logit of 0 costs log 2 for each of 64 pixels.
    encoder, decoder = parts()
    zeroed(encoder)
    zeroed(decoder)
    data = stripes()
    found = negative_elbo(encoder, decoder, data.x, data.y, torch.randn(32, 2))
    torch.testing.assert_close(found, torch.full((32,), 64 * torch.tensor(2.0).log().item()))


def test_the_bound_by_hand() -> None:
    # The encoder says mean 2 and variance 1 for both latent numbers: 2 + 2. The decoder says 0: half the square.
    encoder, decoder = parts(is_pixels=False)
    zeroed(encoder)
    zeroed(decoder)
    with torch.no_grad():
        # The first half of what the encoder gives are the means.
        list(encoder.net.last.parameters())[-1][:2] = 2.0
    x, y = torch.full((1, 1, 8, 8), 0.5), torch.tensor([1])
    assert negative_elbo(encoder, decoder, x, y, torch.zeros(1, 2)).item() == pytest.approx(64 * 0.125 + 4)
    assert negative_elbo(encoder, decoder, x, y, torch.zeros(1, 2), 0.5).item() == pytest.approx(64 * 0.125 + 2)


def test_a_decoder_learns_to_draw_the_class_that_is_wanted() -> None:
    encoder, decoder = parts()
    data = stripes()
    curve = train_conditional(encoder, decoder, data, SMALL, rng=Rng(1), device=torch.device("cpu"))
    assert curve.shape == (40,)
    assert float(curve[-1]) < 0.5 * float(curve[0])
    with torch.no_grad():
        made = decoder(torch.zeros(2, 2), torch.tensor([0, 1]))
    distances = (made[:, None] - data.x[[0, 16]]).square().flatten(2).mean(2)
    assert distances.argmin(1).tolist() == [0, 1]


def test_the_same_seed_gives_the_same_bits() -> None:
    def curve() -> Tensor:
        encoder, decoder = parts()
        settings = Autoencoding(num_epochs=2, batch_size=8, latent_size=2, width=4)
        return train_conditional(encoder, decoder, stripes(), settings, rng=Rng(1), device=torch.device("cpu"))

    assert torch.equal(curve(), curve())


def test_an_autoencoder_learns_its_inputs() -> None:
    x = stripes().x
    net = train_autoencoder(x, SMALL, is_pixels=True, rng=Rng(0))
    assert float((net(x) - x).detach().abs().mean()) < 0.1


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_epochs": 0}, "num_epochs is 0\n  where: autoencoding.num_epochs\n  fix:   give at least 1"),
        ({"batch_size": 1}, "batch_size is 1\n  where: autoencoding.batch_size\n  fix:   give at least 2"),
        ({"kl_weight": -1}, "kl_weight is -1\n  where: autoencoding.kl_weight\n  fix:   give at least 0"),
        (
            {"learning_rate": 0},
            "learning_rate is 0\n  where: autoencoding.learning_rate\n  fix:   give a number above 0",
        ),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Autoencoding(**settings)  # type: ignore[arg-type]
    assert str(caught.value) == words
