"""Choosing, disguising and distilling images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedfuse.core.examples import Examples, InputSpace
from fedfuse.training.coreset import (
    Crops,
    PixelCoder,
    choose,
    disguise,
    distil_images,
    easiest_crops,
    features_seen,
)

CPU = torch.device("cpu")


def crops(labels: list[int], losses: list[float]) -> Crops:
    return Crops(torch.zeros(len(labels), 1, 2, 2), torch.tensor(labels), torch.tensor(losses))


def test_the_easiest_of_each_class_meet_the_hardest_that_stay() -> None:
    #      position: 0    1    2    3    4 are class 0, 5 is class 1
    found = crops([0, 0, 0, 0, 0, 1], [0.3, 0.1, 0.9, 0.2, 0.8, 0.5])
    chosen, partners = choose(found, 2, 3)
    assert chosen.tolist() == [1, 3, 5]
    # Class 0 leaves 0, 4 and 2; the hardest is 2, then 4. Class 1 has nobody else: the hardest of all is 2.
    assert partners.tolist() == [2, 4, 2]


def test_where_all_are_chosen_they_meet_each_other() -> None:
    chosen, partners = choose(crops([0, 0, 0], [0.3, 0.1, 0.2]), 5, 1)
    assert chosen.tolist() == [1, 2, 0]
    assert all(a != b for a, b in zip(chosen.tolist(), partners.tolist(), strict=True))


def test_few_partners_are_used_again() -> None:
    chosen, partners = choose(crops([0] * 4, [0.1, 0.2, 0.3, 0.9]), 3, 1)
    assert (chosen.tolist(), partners.tolist()) == ([0, 1, 2], [3, 3, 3])


def test_an_image_that_is_alone_has_no_partner() -> None:
    chosen, partners = choose(crops([1], [0.1]), 3, 2)
    assert (chosen.tolist(), partners.tolist()) == ([0], [-1])


class Brightness(nn.Module):
    """The brighter, the more of class 1."""

    def forward(self, x: Tensor) -> Tensor:
        bright = x.flatten(1).mean(1)
        return torch.stack([-bright, bright], 1)


def test_the_crop_with_the_lowest_loss_is_kept() -> None:
    # Bright above, dark below: for class 1 a good crop lies above, for class 0 below.
    x = torch.zeros(2, 1, 8, 8)
    x[:, :, :4] = 1
    raw = Examples(x, torch.tensor([0, 1]))
    found = easiest_crops(
        Brightness(),
        raw,
        InputSpace(is_pixels=True),
        num_crops=20,
        smallest_area=0.3,
        draw=torch.Generator().manual_seed(0),
        device=CPU,
    )
    dark, bright = found.images.flatten(1).mean(1).tolist()
    assert dark < 0.4
    assert bright > 0.6
    torch.testing.assert_close(found.losses[0], torch.log1p(torch.exp(torch.tensor(2 * dark))), rtol=1e-4, atol=1e-5)


def test_whole_images_stay_whole() -> None:
    raw = Examples(torch.rand(3, 1, 4, 4), torch.zeros(3, dtype=torch.int64))
    found = easiest_crops(
        Brightness(),
        raw,
        InputSpace(is_pixels=True),
        num_crops=2,
        smallest_area=1.0,
        draw=torch.Generator(),
        device=CPU,
    )
    assert torch.equal(found.images, raw.x)


def test_a_disguise_keeps_pixels_in_their_range() -> None:
    generator = torch.Generator().manual_seed(0)
    x, other = torch.rand(4, 1, 8, 8, generator=generator), torch.rand(4, 1, 8, 8, generator=generator).round()
    hidden = disguise(x, other, 1.0, is_pixels=True)
    assert 0 <= float(hidden.min()) <= float(hidden.max()) <= 1
    assert float((hidden - x).abs().mean()) > 0.05
    assert bool((disguise(x, other, 1.0, is_pixels=False) != hidden).any())


def linear() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.ReLU(), nn.Linear(3, 2))


def test_features_are_what_enters_the_last_linear_layer() -> None:
    model, x = linear(), torch.rand(2, 1, 4, 4)
    with features_seen(model) as seen:
        model(x)
    torch.testing.assert_close(seen[0], model[:3](x))
    with features_seen(Brightness()) as seen:
        pass
    assert seen == []


@pytest.mark.parametrize("label_weight", [0.0, 0.01])
def test_distilled_images_have_the_features_of_the_originals(label_weight: float) -> None:
    model = linear()
    generator = torch.Generator().manual_seed(3)
    wanted = Examples(torch.rand(6, 1, 4, 4, generator=generator), torch.zeros(6, dtype=torch.int64))
    start = torch.rand(6, 1, 4, 4, generator=generator)
    inputs = InputSpace(is_pixels=True)

    def gap(x: Tensor) -> float:
        return float((model[:3](x.clamp(0, 1)) - model[:3](wanted.x)).detach().square().mean())

    found = distil_images(
        model,
        PixelCoder(),
        start,
        wanted,
        inputs,
        num_steps=60,
        learning_rate=0.02,
        label_weight=label_weight,
        device=CPU,
    )
    assert gap(found) < 0.2 * gap(start)
    assert not torch.allclose(found, wanted.x, atol=0.05)


def test_no_step_only_encodes_and_the_path_of_an_image_is_its_own() -> None:
    model, inputs = linear(), InputSpace(is_pixels=True)
    wanted, start = Examples(torch.rand(5, 1, 4, 4), torch.zeros(5, dtype=torch.int64)), torch.rand(5, 1, 4, 4)

    def go(part: slice, num_steps: int) -> Tensor:
        return distil_images(
            model,
            PixelCoder(),
            start[part],
            Examples(wanted.x[part], wanted.y[part]),
            inputs,
            num_steps=num_steps,
            learning_rate=0.02,
            label_weight=0.0,
            device=CPU,
        )

    assert torch.equal(go(slice(5), 0), start)
    torch.testing.assert_close(go(slice(5), 5)[:2], go(slice(2), 5), rtol=1e-4, atol=1e-5)
