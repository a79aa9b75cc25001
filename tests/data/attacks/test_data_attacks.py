"""Flipped labels and stamped patches, redone by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import Examples
from fedfuse.core.seeding import Rng
from fedfuse.data.attacks.attack import Inputs
from fedfuse.data.attacks.backdoor import Backdoor
from fedfuse.data.attacks.label_flip import LabelFlip
from fedfuse.data.normalize import Normalization

PLAIN = Inputs(5, Normalization())


def test_labels_are_mirrored_and_twice_is_none() -> None:
    examples = Examples(torch.rand(5, 2), torch.arange(5))
    flipped = LabelFlip().poison(examples, PLAIN, Rng(0))
    assert flipped.y.tolist() == [4, 3, 2, 1, 0]
    assert flipped.x.equal(examples.x)
    assert LabelFlip().poison(flipped, PLAIN, Rng(0)).y.equal(examples.y)
    assert not LabelFlip().forges_uploads


def test_the_class_in_the_middle_tells_nothing() -> None:
    wanted = LabelFlip().wanted(Examples(torch.arange(5.0)[:, None], torch.arange(5)), PLAIN)
    assert wanted.y.tolist() == [4, 3, 1, 0]
    assert wanted.x.flatten().tolist() == [0, 1, 3, 4]


def test_the_patch_is_in_the_lower_right_corner_in_every_channel() -> None:
    inputs = Inputs(2, Normalization((0.5, 0.25), (0.25, 0.5)))
    x = torch.full((1, 2, 3, 3), 9.0)
    stamped = Backdoor(size=2, value=1.0).stamped(x, inputs)
    assert stamped[0, 0].tolist() == [[9, 9, 9], [9, 2, 2], [9, 2, 2]]
    assert stamped[0, 1].tolist() == [[9, 9, 9], [9, 1.5, 1.5], [9, 1.5, 1.5]]
    assert x.eq(9).all()


def test_of_rows_the_last_features_are_stamped() -> None:
    inputs = Inputs(2, Normalization((0.0, 1.0, 2.0), (1.0, 1.0, 2.0)))
    assert Backdoor(size=2, value=4.0).stamped(torch.zeros(1, 3), inputs).tolist() == [[0, 3, 1]]


@given(st.integers(0, 30), st.sampled_from([0.1, 0.5, 1.0]), st.integers(0, 100))
def test_as_many_are_stamped_and_relabelled_as_was_asked(count: int, fraction: float, seed: int) -> None:
    examples = Examples(torch.zeros(count, 1, 4, 4), torch.arange(count) % 4 + 1)
    poisoned = Backdoor(target=0, fraction=fraction, size=1).poison(examples, PLAIN, Rng(seed))
    is_stamped = poisoned.x[:, 0, 3, 3] == 1
    assert int(is_stamped.sum()) == round(fraction * count)
    assert poisoned.y[is_stamped].eq(0).all()
    assert poisoned.y[~is_stamped].equal(examples.y[~is_stamped])
    assert poisoned.x.sum() == is_stamped.sum()


def test_wanted_are_stamped_inputs_of_other_classes() -> None:
    examples = Examples(torch.zeros(6, 1, 2, 2), torch.tensor([0, 1, 2, 2, 3, 3]))
    wanted = Backdoor(target=2, size=1).wanted(examples, PLAIN)
    assert wanted.y.tolist() == [2, 2, 2, 2]
    assert wanted.x[:, 0, 1, 1].tolist() == [1, 1, 1, 1]


def test_a_factor_replaces_the_model() -> None:
    assert not Backdoor().forges_uploads
    attack = Backdoor(factor=10.0)
    assert attack.forges_uploads
    assert attack.forge(torch.tensor([2.0]), torch.tensor([1.5]), torch.Generator()).tolist() == [6.5]


def test_settings_that_cannot_be() -> None:
    for settings, message in [
        ({"target": -1}, "target is -1\n  where: attack.target\n  fix:   give the number of a class"),
        ({"fraction": 0.0}, "fraction is 0.0\n  where: attack.fraction\n  fix:   give a fraction in (0, 1]"),
        ({"size": 0}, "size is 0\n  where: attack.size\n  fix:   give at least 1"),
    ]:
        with pytest.raises(ConfigError) as caught:
            Backdoor(**settings)  # type: ignore[arg-type]
        assert str(caught.value) == message
    examples = Examples(torch.zeros(1, 1, 2, 2), torch.tensor([0]))
    with pytest.raises(ConfigError, match="there is no class 5"):
        Backdoor(target=5).poison(examples, PLAIN, Rng(0))
    with pytest.raises(ConfigError, match="there is no class 5"):
        Backdoor(target=5).wanted(examples, PLAIN)
    for x in (torch.zeros(1, 1, 2, 2), torch.zeros(1, 2), torch.zeros(1, 3, 4)):
        with pytest.raises(DataError, match="a patch of 3 does not fit onto inputs of shape"):
            Backdoor(size=3).stamped(x, PLAIN)
