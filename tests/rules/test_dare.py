"""DARE: what is dropped, what is left, and that nothing depends on an order."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fedfuse.core.errors import ConfigError
from fedfuse.rules import fuse_uploads, rule
from fedfuse.rules.dare import Dare
from fedfuse.rules.mean import Mean
from fedfuse.rules.rule import Source
from fedfuse.rules.ties import Ties

N = 4000
BASE = {"v": torch.full((N,), 5.0), "w": torch.full((N,), 5.0)}
ONES = [{f"model/{name}": torch.full((N,), 6.0) for name in "vw"}] * 3


def test_kept_changes_are_rescaled_and_about_the_wanted_part_is_dropped() -> None:
    kept = Dare(drop_fraction=0.75).prepare(torch.ones(N).double(), Source("w", 0, 1))
    assert set(kept.tolist()) == {0.0, 4.0}
    # Four standard deviations of a binomial.
    assert abs(float(kept.mean()) - 1) < 4 * (3 / N) ** 0.5


def test_the_mean_of_what_is_left_of_each_client() -> None:
    which = Dare(drop_fraction=0.5)
    fused = fuse_uploads(ONES, which, base=BASE)["w"]
    rows = [which.prepare(torch.ones(N).double(), Source("w", position, 3)) for position in range(3)]
    torch.testing.assert_close(fused, (5 + torch.stack(rows).mean(0)).float())
    assert {round(value, 4) for value in fused.tolist()} == {5.0, 5.6667, 6.3333, 7.0}


def test_nothing_dropped_is_the_mean() -> None:
    uploads = [{"model/w": torch.tensor([1.0, -4.0])}, {"model/w": torch.tensor([3.0, 1.0])}]
    base = {"w": torch.tensor([1.0, 1.0])}
    assert fuse_uploads(uploads, Dare(drop_fraction=0.0), base=base)["w"].equal(fuse_uploads(uploads, Mean())["w"])


def test_nothing_dropped_with_ties_is_ties_without_trimming() -> None:
    uploads = [{"model/w": torch.randn(50, generator=torch.Generator().manual_seed(i))} for i in range(4)]
    base = {"w": torch.zeros(50)}
    fused = fuse_uploads(uploads, Dare(drop_fraction=0.0, combine="ties"), base=base)["w"]
    assert fused.equal(fuse_uploads(uploads, Ties(keep_fraction=1.0), base=base)["w"])


def test_choices_differ_by_client_by_tensor_and_by_seed_and_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    which, ones = Dare(), torch.ones(N).double()
    first = which.prepare(ones, Source("w", 0, 3))
    for source, other in ((Source("w", 1, 3), which), (Source("v", 0, 3), which), (Source("w", 0, 3), Dare(seed=1))):
        assert not other.prepare(ones, source).equal(first)
    assert which.prepare(ones, Source("w", 0, 7)).equal(first)
    fused = fuse_uploads(ONES, which, base=BASE)
    assert not fused["w"].equal(fused["v"])
    monkeypatch.setattr(rule, "_CHUNK_BYTES", 64)
    assert fuse_uploads(ONES, which, base=BASE)["w"].equal(fused["w"])


@pytest.mark.parametrize("drop_fraction", [1.0, -0.1])
def test_fractions_that_cannot_be(drop_fraction: float) -> None:
    with pytest.raises(ConfigError) as caught:
        Dare(drop_fraction=drop_fraction)
    assert str(caught.value) == (
        f"drop_fraction is {drop_fraction}\n  where: rule.drop_fraction\n  fix:   give a fraction in [0, 1)"
    )


@pytest.mark.parametrize("combine", ["mean", "ties"])
def test_one_client_with_nothing_dropped_comes_back(combine: Any) -> None:
    fused = fuse_uploads(ONES[:1], Dare(drop_fraction=0.0, combine=combine), base=BASE)
    assert fused["w"].equal(ONES[0]["model/w"])
