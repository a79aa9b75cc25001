"""Networks that make inputs from noise."""

from __future__ import annotations

import pytest
import torch

from fedfuse.core.errors import ModelError
from fedfuse.models.generator import Generator, Pixels


@pytest.mark.parametrize(
    "input_shape", [(1, 8, 8), (3, 32, 32), (1, 28, 28), (3, 64, 64), (2, 30, 30), (1, 5, 7), (1, 1, 1), (64,), (3,)]
)
@pytest.mark.parametrize("is_pixels", [True, False])
def test_inputs_have_the_wanted_shape_and_range(input_shape: tuple[int, ...], is_pixels: bool) -> None:
    generator = Generator(input_shape, latent_size=8, width=4, is_pixels=is_pixels)
    made = generator(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)))
    assert made.shape == (5, *input_shape)
    if is_pixels:
        assert 0 <= made.min() <= made.max() <= 1


def test_values_of_unknown_range_have_mean_0_and_variance_1() -> None:
    generator = Generator((3, 8, 8), latent_size=16, width=8, is_pixels=False)
    made = generator(torch.randn(64, 16, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(made.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(made.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-2, rtol=0)


def test_a_reset_depends_on_its_source_alone() -> None:
    generator = Generator((1, 8, 8), latent_size=64, width=32, is_pixels=True)
    generator(torch.randn(4, 64))
    generator.reset(torch.Generator().manual_seed(3))
    first = {name: tensor.clone() for name, tensor in generator.state_dict().items()}
    generator(torch.randn(4, 64))
    with torch.no_grad():
        for parameter in generator.parameters():
            parameter.add_(1.0)
    generator.reset(torch.Generator().manual_seed(3))
    for name, tensor in generator.state_dict().items():
        assert torch.equal(tensor, first[name]), name
    assert generator.first.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert all(p.abs().max() == 0 for n, p in generator.named_parameters() if n.endswith("bias"))
    norms = torch.cat([m.weight for m in generator.modules() if isinstance(m, torch.nn.BatchNorm2d)])
    assert norms.mean().item() == pytest.approx(1.0, abs=0.02)


def test_inputs_of_another_kind_are_refused() -> None:
    with pytest.raises(ModelError) as caught:
        Generator((5, 8), latent_size=8, width=4, is_pixels=False)
    assert str(caught.value) == (
        "inputs of shape (5, 8) cannot be made from noise\n  where: model\n"
        "  fix:   use a method that makes no inputs, such as feddf with server data, or fusefl"
    )


@pytest.mark.parametrize("is_pixels", [True, False])
def test_pixels_are_themselves(is_pixels: bool) -> None:
    pixels = Pixels(6, (1, 4, 4), is_pixels=is_pixels)
    pixels.reset(torch.Generator().manual_seed(1))
    made = pixels(torch.zeros(6, 1))
    noise = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(made, noise.sigmoid() if is_pixels else noise)
    made.sum().backward()
    assert pixels.values.grad is not None
    assert made.data_ptr() != pixels.values.data_ptr()
