"""FuseFL: clients with models of their own, and the width that fits a budget."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedfuse.core.artifact import Artifact
from fedfuse.core.errors import ModelError
from fedfuse.methods.fusefl import FuseFL
from fedfuse.methods.heads import Head
from fedfuse.methods.tasks import read_moments
from fedfuse.models import blocks
from fedfuse.models.blocks import cut_spec
from fedfuse.ops.moments import lda_head, pool
from fedfuse.training import LocalSGD, predict

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)
SMALL = {"width": 4, "depth": 4}
IDS = ["client_0", "client_1", "client_2"]


def fusefl_of(**settings: Any) -> FuseFL:
    return FuseFL(**{"num_blocks": 2, "local": SETTINGS, **settings})


MIXED = {"client_1": ("cnn", {"width": 6, "depth": 4}), "client_2": ("cnn", {"width": 4, "depth": 6})}
"""Beside a cnn of width 4 and depth 4: a wider and a deeper one."""


def test_clients_may_own_different_widths_and_depths(federation: Any, x: Tensor, tmp_path: Any) -> None:
    fed = federation(client_models=MIXED, **SMALL)
    method = fusefl_of()
    fused = fed.fuse(method)
    interfaces = [cut_spec(fed.job.model_of(c), 2).interfaces for c in IDS]
    assert len({i[0][0] for i in interfaces}) > 1
    for column, entry in enumerate(fused.model.recipe["levels"][1]):
        assert entry["adaptor"]["num_channels"] == [i[0][0] for i in interfaces]
        assert entry["out_channels"] == interfaces[column][0][0]
    assert fused.model.recipe["head"] == [sum(i[1][0] for i in interfaces), 4]
    weights, biases = lda_head(pool(read_moments(fed.upload("moments", c)) for c in IDS))
    wanted = fed.composed(method, x).double() @ weights.T + biases
    torch.testing.assert_close(predict(fused.model.module(), x).double(), wanted, rtol=1e-3, atol=1e-2)
    again = Artifact.read(fused.model.save(tmp_path / "artifact"))
    assert torch.equal(predict(again.module(), x), predict(fused.model.module(), x))


def test_what_a_process_built_before_does_not_change_the_bits(federation: Any) -> None:
    digests = []
    for is_cold in (True, False, True):
        if is_cold:
            blocks._rebuilt.cache_clear()
            blocks._cut_spec.cache_clear()
        digests.append(federation(client_models=MIXED, **SMALL).fuse(fusefl_of()).model.digest())
    assert len(set(digests)) == 1


def test_the_ensemble_head_takes_heads_of_different_widths(federation: Any, x: Tensor) -> None:
    fed = federation(client_models=MIXED, **SMALL)
    fused = fed.fuse(fusefl_of(head=Head(kind="ensemble")))
    assert predict(fused.model.module(), x).shape == (20, 4)


@pytest.mark.parametrize("adaptor", ["mean", "attention"])
def test_adaptors_that_need_equal_widths_say_so_before_anybody_trains(federation: Any, adaptor: Any) -> None:
    fed = federation(client_models=MIXED, **SMALL)
    channels = [cut_spec(fed.job.model_of(c), 2).interfaces[0][0] for c in IDS]
    with pytest.raises(ModelError) as caught:
        fed.fuse(fusefl_of(adaptor=adaptor))
    assert str(caught.value) == (
        f'the adaptor "{adaptor}" cannot join maps of {sorted(set(channels))} channels into {channels[0]}\n'
        "  fix:   use adaptor: conv1x1 for clients with models of different widths"
    )
    assert fed.cohort.ledger.exchanges() == []


@pytest.mark.parametrize(
    ("head", "message"),
    [
        (Head(kind="average"), "heads of different widths cannot be averaged"),
        (Head(kind="calibrated"), "heads of different widths cannot be averaged"),
        (Head(features="mean"), "features of different widths cannot be averaged"),
    ],
)
def test_heads_on_the_mean_of_features_need_equal_widths(federation: Any, head: Head, message: str) -> None:
    fed = federation(client_models=MIXED, **SMALL)
    with pytest.raises(ModelError) as caught:
        fed.fuse(fusefl_of(head=head))
    assert caught.value.what == message
    assert fed.cohort.ledger.exchanges() == []


def test_levels_that_do_not_fit_side_by_side_are_told_before_anybody_trains(federation: Any) -> None:
    fed = federation(client_models={"client_1": ("mlp", {"width": 4, "depth": 3})}, **SMALL)
    with pytest.raises(ModelError) as caught:
        fed.fuse(fusefl_of())
    assert caught.value.what.startswith("blocks of one level end in maps that do not fit side by side: ")
    assert fed.cohort.ledger.exchanges() == []


# --- width


def num_parameters(fed: Any, method: FuseFL) -> int:
    return sum(p.numel() for p in fed.fuse(method).model.module().parameters())


@pytest.mark.parametrize("adaptor", ["conv1x1", "mean", "attention"])
@pytest.mark.parametrize("match_factor", [1.0, 2.0])
def test_matched_width_is_the_largest_within_the_budget(federation: Any, adaptor: Any, match_factor: float) -> None:
    fed = federation(width=16, depth=2)
    budget = match_factor * sum(p.numel() for p in fed.spec.build().parameters())
    method = fusefl_of(width="match", match_factor=match_factor, adaptor=adaptor)
    width = method.width_for(fed.job, 3)
    assert 1 <= width < 16
    assert num_parameters(fed, method) <= budget
    assert fed.job.facts["width"] == width
    assert fed.message("block_0", "client_0")["width"] == width
    assert num_parameters(federation(width=16, depth=2), fusefl_of(width=width + 1, adaptor=adaptor)) > budget


def test_the_budget_of_all_models_keeps_nearly_the_full_width(federation: Any) -> None:
    fed = federation(width=8, depth=2)
    widths = [fusefl_of(width="match", match_factor=f).width_for(fed.job, 3) for f in (1.0, 2.0, 3.0, 100.0)]
    assert widths == sorted(widths)
    assert widths[-1] == 8


def test_own_width_leaves_models_as_they_are_and_a_number_sets_it(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    assert fusefl_of().width_for(fed.job, 3) == 0
    fed.fuse(fusefl_of())
    assert fed.job.facts["width"] == "own"
    assert fed.upload("block_0", "client_0").tensor("block/0.weight").shape[0] == 4
    fed.fuse(fusefl_of(width=3))
    assert fed.upload("block_0", "client_0").tensor("block/0.weight").shape[0] == 3


def test_a_budget_that_no_width_fits(federation: Any) -> None:
    fed = federation(width=2, depth=2)
    with pytest.raises(ModelError) as caught:
        fed.fuse(fusefl_of(width="match", match_factor=0.1))
    budget = 0.1 * sum(p.numel() for p in fed.spec.build().parameters())
    assert str(caught.value) == (
        f"not even width 1 fits 3 columns into {budget:,.0f} parameters\n"
        "  where: method.width\n"
        "  fix:   raise method.match_factor or the model's width"
    )
