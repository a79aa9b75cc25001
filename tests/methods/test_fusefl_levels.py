"""FuseFL: frozen levels and the dropout of features in front of a stage."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedfuse.methods import fusefl
from fedfuse.methods.fusefl import FuseFL, OnFrozen, Stage, drop_columns
from fedfuse.models.fused import Adaptor, channel_dim
from fedfuse.training import LocalSGD

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)
SMALL = {"width": 4, "depth": 4}
IDS = ["client_0", "client_1", "client_2"]


def fusefl_of(**settings: Any) -> FuseFL:
    return FuseFL(**{"num_blocks": 2, "local": SETTINGS, **settings})


# --- frozen levels


def test_frozen_levels_are_uploaded_once_and_never_move(federation: Any) -> None:
    for frozen_batchnorm in ("eval", "train"):
        fed = federation(**SMALL)
        fused = fed.fuse(fusefl_of(frozen_batchnorm=frozen_batchnorm))
        for column, client_id in enumerate(IDS):
            prefix = f"levels.0.columns.{column}.block."
            for name, tensor in fed.upload("block_0", client_id).group("block").items():
                assert torch.equal(fused.model.state[prefix + name], tensor)
            for name, tensor in fed.kept("client_0")[-1].group(f"fused/0/{client_id}/block").items():
                assert torch.equal(fused.model.state[prefix + name], tensor)


def test_batchnorm_of_frozen_levels_in_training_mode_changes_the_next_block_only(federation: Any) -> None:
    fed = federation(**SMALL)
    fed.fuse(fusefl_of())
    quiet = {k: fed.upload(f"block_{k}", "client_0").group("block") for k in (0, 1)}
    fed.fuse(fusefl_of(frozen_batchnorm="train"))
    moved = {k: fed.upload(f"block_{k}", "client_0").group("block") for k in (0, 1)}
    assert all(torch.equal(moved[0][name], tensor) for name, tensor in quiet[0].items())
    assert not all(torch.equal(moved[1][name], tensor) for name, tensor in quiet[1].items())


def test_the_mode_of_frozen_levels() -> None:
    def parts() -> tuple[nn.BatchNorm1d, Stage]:
        return nn.BatchNorm1d(2), Stage(None, [nn.Linear(2, 2)], nn.Linear(2, 2), 0.0)

    x = torch.randn(8, 2, generator=torch.Generator().manual_seed(0)) + 3
    for trains in (False, True):
        frozen, stage = parts()
        net = OnFrozen(frozen, stage, trains_batchnorm=trains)
        net.train()(x)
        assert (frozen.training, stage.training) == (trains, True)
        assert int(frozen.num_batches_tracked) == int(trains)
        net.eval()
        assert not frozen.training


@pytest.mark.parametrize(("family", "settings"), [("cnn", SMALL), ("mlp", {"width": 8, "depth": 3})])
def test_frozen_features_computed_once_or_in_every_batch_give_the_same_training(
    federation: Any, monkeypatch: pytest.MonkeyPatch, family: str, settings: dict[str, Any]
) -> None:
    cached = federation(family, **settings)
    cached.fuse(fusefl_of())
    monkeypatch.setattr(fusefl, "_CACHE_BYTES", 0)
    fresh = federation(family, **settings)
    fresh.fuse(fusefl_of())
    for client_id in IDS:
        once, anew = cached.upload("block_1", client_id), fresh.upload("block_1", client_id)
        for key in once:
            if isinstance(once[key], Tensor):
                # Adaptors travel in bfloat16: a last bit may round the other way.
                tolerance = 1e-2 if key.startswith("adaptor/") else 1e-4
                torch.testing.assert_close(once[key], anew[key], rtol=tolerance, atol=tolerance)


def test_augmented_images_go_through_the_frozen_levels_batch_by_batch(
    federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    original = fusefl.train

    def watched(module: nn.Module, examples: Any, *others: Any, **settings: Any) -> Any:
        seen.append(f"{type(module).__name__} {tuple(examples.x.shape[1:])}")
        return original(module, examples, *others, **settings)

    monkeypatch.setattr(fusefl, "train", watched)
    federation(augment="flip", num_clients=1, **SMALL).fuse(fusefl_of())
    assert seen == ["Stage (1, 8, 8)", "OnFrozen (1, 8, 8)"]
    seen.clear()
    fed = federation(num_clients=1, **SMALL)
    fed.fuse(fusefl_of())
    assert seen[0] == "Stage (1, 8, 8)"
    assert seen[1].startswith("Stage (")
    assert seen[1] != "Stage (1, 8, 8)"


# --- dropout of features


def test_dropped_columns_are_zero_and_the_others_are_scaled_up() -> None:
    joined = torch.ones(4000, 5)
    torch.manual_seed(3)
    dropped = drop_columns(joined, (2, 3), 0.25)
    assert dropped.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    # Columns are dropped whole.
    assert torch.equal(dropped[:, 0], dropped[:, 1])
    assert torch.equal(dropped[:, 2], dropped[:, 3])
    assert torch.equal(dropped[:, 3], dropped[:, 4])
    assert float((dropped[:, 0] == 0).double().mean()) == pytest.approx(0.25, abs=0.03)
    assert float(((dropped[:, 0] == 0) & (dropped[:, 2] == 0)).double().mean()) == pytest.approx(0.0625, abs=0.02)
    assert float(dropped.mean()) == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("shape", [(6, 5), (6, 7, 5), (6, 5, 2, 3)])
def test_columns_are_dropped_along_the_channels_of_every_layout(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    dropped = drop_columns(torch.ones(shape), (2, 3), 0.5).movedim(channel_dim(len(shape)), -1).reshape(6, -1, 5)
    per_example = dropped[:, 0]
    assert torch.equal(dropped, per_example[:, None].expand_as(dropped))
    assert sorted(per_example.unique().tolist()) == [0.0, 2.0]


def test_feature_dropout_works_in_training_only(federation: Any) -> None:
    stage = Stage(Adaptor("mean", [2, 2], 2, 2), [nn.Identity()], nn.Linear(2, 2), 0.9)  # type: ignore[list-item]
    x = torch.ones(50, 4)
    torch.manual_seed(0)
    assert not torch.equal(stage.train()(x), stage(x))
    assert torch.equal(stage.eval()(x), stage(x))

    fed = federation(**SMALL)
    fed.fuse(fusefl_of())
    plain = [fed.upload(f"block_{k}", "client_0").group("block") for k in (0, 1)]
    fed.fuse(fusefl_of(feature_dropout=0.5))
    dropped = [fed.upload(f"block_{k}", "client_0").group("block") for k in (0, 1)]
    assert all(torch.equal(dropped[0][name], tensor) for name, tensor in plain[0].items())
    assert not all(torch.equal(dropped[1][name], tensor) for name, tensor in plain[1].items())
