"""FuseFL: what crosses, what clients keep, and the fused network against its composition by hand."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedfuse.core.artifact import Artifact, load_state
from fedfuse.core.errors import ConfigError, ModelError
from fedfuse.core.payload import Payload, read_header
from fedfuse.core.registry import MODELS
from fedfuse.methods import fusefl
from fedfuse.methods.feature_ensemble import FeatureEnsemble
from fedfuse.methods.fusefl import FuseFL, OnFrozen, Stage, drop_columns, messages_for
from fedfuse.methods.heads import Head, joint_head
from fedfuse.methods.tasks import read_moments
from fedfuse.models import blocks
from fedfuse.models.blocks import cut_spec
from fedfuse.models.fused import Adaptor, channel_dim
from fedfuse.ops.moments import lda_head, pool
from fedfuse.training import LocalSGD, predict, train

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)
SMALL = {"width": 4, "depth": 4}
IDS = ["client_0", "client_1", "client_2"]

FAMILIES: dict[str, dict[str, Any]] = {
    "cnn": SMALL,
    "mlp": {"width": 8, "depth": 3},
    "resnet": {"width": 2},
    "vit": {"width": 8, "depth": 2, "heads": 2},
}


def fusefl_of(**settings: Any) -> FuseFL:
    return FuseFL(**{"num_blocks": 2, "local": SETTINGS, **settings})


def composed(fed: Any, method: FuseFL, inputs: Tensor) -> Tensor:
    """The fused features, put together by hand from the uploads in the journal."""
    uploads: dict[tuple[str, str], Payload] = {
        (entry.facts["exchange"], entry.facts["client"]): entry.payload() for entry in fed.journal.entries()
    }
    level, channels, ndim = inputs, [], 0
    for k in range(method.num_blocks):
        maps = []
        for client_id in [c for c in fed.cohort.client_ids if (f"block_{k}", c) in uploads]:
            upload, pieces = uploads[f"block_{k}", client_id], cut_spec(fed.job.model_of(client_id), method.num_blocks)
            block = pieces.copy().blocks[k]
            load_state(block, upload.group("block"))
            entrance = level
            if k:
                adaptor = Adaptor(method.adaptor, channels, pieces.interfaces[k - 1][0], ndim)
                load_state(adaptor, {name: t.float() for name, t in upload.group("adaptor").items()})
                entrance = adaptor.eval()(level)
            maps.append(block.eval()(entrance))
        channels, ndim = [m.shape[channel_dim(m.ndim)] for m in maps], maps[0].ndim
        level = torch.cat(maps, channel_dim(ndim))
    if method.head.sees == "mean":
        return level.unflatten(1, (len(channels), -1)).mean(1).detach()
    return level.detach()


# --- the fused network


@pytest.mark.parametrize("adaptor", ["conv1x1", "mean", "attention"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_artifact_is_the_composition_of_the_uploaded_blocks(
    federation: Any, x: Tensor, family: str, adaptor: Any
) -> None:
    if family not in MODELS.names():
        pytest.skip(f"there is no {family} yet")
    fed = federation(family, num_clients=2, **FAMILIES[family])
    method = fusefl_of(adaptor=adaptor)
    fused = fed.fuse(method)
    moments = pool(read_moments(fed.upload("moments", c)) for c in fed.cohort.client_ids)
    weights, biases = lda_head(moments)
    features = composed(fed, method, x)
    wanted = features.double() @ weights.T + biases
    torch.testing.assert_close(predict(fused.model.module(), x).double(), wanted, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("num_blocks", [1, 2, 4, 8])
def test_any_number_of_blocks(federation: Any, x: Tensor, num_blocks: int, tmp_path: Any) -> None:
    fed = federation(num_clients=2, width=4, depth=8)
    fused = fed.fuse(fusefl_of(num_blocks=num_blocks, local=LocalSGD(num_epochs=8, batch_size=32)))
    exchanges = [f"block_{k}" for k in range(num_blocks)]
    assert fed.cohort.ledger.exchanges() == [*exchanges, "moments"]
    epochs = [fed.message(key, "client_0")["num_epochs"] for key in exchanges]
    assert epochs == [8 // num_blocks] * num_blocks
    assert [len(level) for level in fused.model.recipe["levels"]] == [2] * num_blocks
    again = Artifact.read(fused.model.save(tmp_path / "artifact"))
    assert torch.equal(predict(again.module(), x), predict(fused.model.module(), x))
    assert fed.job.facts["num_blocks"] == num_blocks
    assert fed.job.facts["num_parameters"] == sum(p.numel() for p in fused.model.module().parameters())


def test_epochs_that_do_not_divide_evenly_go_to_the_first_blocks(federation: Any) -> None:
    fed = federation(**SMALL)
    fed.fuse(fusefl_of(num_blocks=3, local=LocalSGD(num_epochs=5, batch_size=16)))
    assert [fed.message(f"block_{k}", "client_2")["num_epochs"] for k in range(3)] == [2, 2, 1]
    assert [len(fed.upload(f"block_{k}", "client_2").tensor("curve/train_loss")) for k in range(3)] == [2, 2, 1]


def test_one_block_is_feature_ensemble(federation: Any, x: Tensor) -> None:
    # Whole batches: the exchanges have different names, so the order of examples differs, and sums are rounded apart.
    settings = LocalSGD(num_epochs=2, batch_size=64)
    fed = federation(width=4, depth=2)
    for head in (Head(kind="ensemble"), Head(kind="average")):
        one = fed.fuse(fusefl_of(num_blocks=1, local=settings, head=head))
        isolated = fed.fuse(FeatureEnsemble(local=settings, head=head))
        torch.testing.assert_close(
            predict(one.model.module(), x), predict(isolated.model.module(), x), rtol=1e-3, atol=1e-4
        )


def test_the_first_block_is_that_of_the_whole_network_trained_alone(federation: Any) -> None:
    fed = federation(**SMALL)
    fed.fuse(fusefl_of(local=LocalSGD(num_epochs=3, batch_size=16)))
    module = fed.spec.build()
    train(
        module,
        fed.data["client_1"].train,
        SETTINGS,
        rng=fed.rng("client_1", "block_0"),
        device=torch.device("cpu"),
        num_epochs=2,
    )
    uploaded, whole = fed.upload("block_0", "client_1").group("block"), module.state_dict()
    assert uploaded
    for name, tensor in uploaded.items():
        torch.testing.assert_close(tensor, whole[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["average", "ensemble", "calibrated", "lda"])
def test_every_head(federation: Any, x: Tensor, kind: Any) -> None:
    fed = federation(**SMALL)
    head = Head(kind=kind, num_draws=20, num_epochs=1)
    method = fusefl_of(head=head)
    fused = fed.fuse(method)
    asks = kind in ("lda", "calibrated")
    assert fed.cohort.ledger.exchanges() == ["block_0", "block_1"] + ["moments"] * asks
    features, logits = composed(fed, method, x), predict(fused.model.module(), x)
    uploads = [fed.upload("block_1", c).group("head") for c in IDS]
    if kind == "average":
        weight, bias = (torch.stack([u[name] for u in uploads]).mean(0) for name in ("weight", "bias"))
        torch.testing.assert_close(logits, features @ weight.T + bias, rtol=1e-4, atol=1e-4)
    if kind == "ensemble":
        heads = []
        for upload in uploads:
            heads.append(nn.Linear(*reversed(upload["weight"].shape)))
            load_state(heads[-1], upload)
        torch.testing.assert_close(logits, joint_head(heads)(features).detach(), rtol=1e-4, atol=1e-4)
    if kind == "calibrated":
        width = uploads[0]["weight"].shape[1]
        assert fed.upload("moments", "client_0").tensor("moments/scatter").shape == (4, width * (width + 1) // 2)


def test_it_learns_what_no_client_knows_alone(federation: Any) -> None:
    fed = federation(num_examples=(60, 60, 60), **SMALL)
    for position, (client_id, data) in enumerate(fed.data.items()):
        rows = torch.nonzero((data.train.y == position) | (data.train.y == 3)).flatten()
        object.__setattr__(fed.data[client_id], "train", data.train.subset(rows))
    fused = fed.fuse(fusefl_of(local=LocalSGD(num_epochs=6, batch_size=16)))
    guess = predict(fused.model.module(), fed.test.x).argmax(1)
    assert (guess == fed.test.y).double().mean() > 0.9


# --- bytes


@pytest.mark.parametrize("num_blocks", [1, 2, 4])
def test_the_uploads_add_up_to_one_model_and_its_adaptors(federation: Any, num_blocks: int) -> None:
    fed = federation(**SMALL)
    fed.fuse(fusefl_of(num_blocks=num_blocks, local=LocalSGD(num_epochs=4, batch_size=16), head=Head(kind="ensemble")))
    pieces, model = cut_spec(fed.spec, num_blocks), Payload(fed.spec.build().state_dict())
    for client_id in IDS:
        uploads = [fed.upload(f"block_{k}", client_id) for k in range(num_blocks)]
        sizes = {
            group: sum(t.numel() * t.element_size() for u in uploads for t in u.group(group).values())
            for group in ("block", "head", "adaptor", "curve")
        }
        # A 1x1 convolution from M C to C channels with its bias, in bfloat16.
        channels = [pieces.interfaces[k][0] for k in range(num_blocks - 1)]
        assert sizes["block"] + sizes["head"] == model.num_bytes
        assert sizes["adaptor"] == sum(2 * (3 * c * c + c) for c in channels)
        assert [bool(u.group("head")) for u in uploads] == [False] * (num_blocks - 1) + [True]
        assert [bool(u.group("adaptor")) for u in uploads] == [False] + [True] * (num_blocks - 1)
        names = [name for u in uploads for name in u.group("block")]
        head = {f"{pieces.head_name}.{name}" for name in uploads[-1].group("head")}
        assert sorted([*names, *head]) == list(model)

        counted = [e for e in fed.cohort.ledger.entries if e.client == client_id]
        encoded = [u.encode() for u in uploads]
        assert [e.upload_bytes for e in counted] == [len(data) for data in encoded]
        # What is sent above the tensors is the format's header alone.
        headers = sum(8 + int.from_bytes(data[:8], "little") for data in encoded)
        assert sum(e.upload_bytes for e in counted) == sum(sizes.values()) + headers
        assert headers < 150 * sum(len(read_header(data)) for data in encoded)


@pytest.mark.parametrize(("dtype", "size"), [("bf16", 2), ("fp32", 4)])
def test_adaptors_travel_in_the_dtype_that_is_set(federation: Any, dtype: Any, size: int) -> None:
    fed = federation(**SMALL)
    fused = fed.fuse(fusefl_of(adaptor_dtype=dtype))
    sent = fed.upload("block_1", "client_0").group("adaptor")
    assert {t.element_size() for t in sent.values()} == {size}
    name = next(name for name in fused.model.state if name.endswith("columns.0.adaptor.mix.weight"))
    assert fused.model.state[name].dtype == torch.float32
    assert torch.equal(fused.model.state[name], sent["mix.weight"].float())


@pytest.mark.parametrize(("kind", "num_levels"), [("lda", 3), ("ensemble", 2)])
def test_every_level_is_sent_once_to_each_client(federation: Any, kind: Any, num_levels: int) -> None:
    fed = federation(**SMALL)
    fed.fuse(fusefl_of(num_blocks=3, local=LocalSGD(num_epochs=3, batch_size=16), head=Head(kind=kind)))
    for client_id in IDS:
        messages = [message for (_, c), message in fed.runtime.sent.items() if c == client_id]
        sent = [key for message in messages for key in message if key.startswith(("fused/", "columns/"))]
        assert len(sent) == len(set(sent))
        assert {key.split("/")[1] for key in sent} == {str(k) for k in range(num_levels)}
        for k in range(num_levels):
            for owner in IDS:
                upload = fed.upload(f"block_{k}", owner)
                message = next(m for m in messages if f"columns/{k}" in m)
                for group in ("block", "adaptor"):
                    given = message.group(f"fused/{k}/{owner}/{group}")
                    assert all(torch.equal(t, given[name]) for name, t in upload.group(group).items())
        downloads = [e.download_bytes for e in fed.cohort.ledger.entries if e.client == client_id]
        assert downloads == [len(message.encode()) for message in messages]
    assert [bool(fed.message("block_0", c).group("fused")) for c in IDS] == [False] * 3


def test_clients_that_lack_the_same_levels_share_one_message() -> None:
    levels = [Payload({"columns/0": "a"}), Payload({"columns/1": "b"})]
    messages = messages_for({"a": 2, "b": 0, "c": 2, "d": 1}, levels, {"level": 2})
    assert messages["a"] is messages["c"]
    assert {c: list(m) for c, m in messages.items()} == {
        "a": ["level"],
        "b": ["columns/0", "columns/1", "level"],
        "c": ["level"],
        "d": ["columns/1", "level"],
    }


# --- clients that leave


def test_a_client_that_misses_an_exchange_keeps_its_older_column_and_catches_up(federation: Any, x: Tensor) -> None:
    fed = federation(absent=[("block_1", "client_1")], quorum=0.6, **SMALL)
    method = fusefl_of(num_blocks=3, local=LocalSGD(num_epochs=3, batch_size=16))
    fused = fed.fuse(method)
    assert [len(level) for level in fused.model.recipe["levels"]] == [3, 2, 3]
    assert fed.cohort.missing == {"client_1": "block_1: away"}
    assert sorted(fed.message("block_2", "client_1").group("fused/0/client_1/block"))
    assert [json.loads(fed.message("block_2", "client_1").text(f"columns/{k}"))[-1]["client"] for k in (0, 1)] == [
        "client_2",
        "client_2",
    ]
    assert "columns/0" not in fed.message("block_2", "client_0")
    assert [c["client"] for c in json.loads(fed.message("block_2", "client_0").text("columns/1"))] == [
        "client_0",
        "client_2",
    ]
    adaptors = [column["adaptor"]["num_channels"] for column in fused.model.recipe["levels"][2]]
    assert all(len(channels) == 2 for channels in adaptors)
    moments = pool(read_moments(fed.upload("moments", c)) for c in IDS)
    weights, biases = lda_head(moments)
    wanted = composed(fed, method, x).double() @ weights.T + biases
    torch.testing.assert_close(predict(fused.model.module(), x).double(), wanted, rtol=1e-3, atol=1e-2)


def test_a_client_that_comes_late_starts_from_the_first_weights(federation: Any) -> None:
    fed = federation(absent=[("block_0", "client_0")], quorum=0.6, **SMALL)
    fused = fed.fuse(fusefl_of())
    assert [len(level) for level in fused.model.recipe["levels"]] == [2, 3]
    assert fed.cohort.missing == {"client_0": "block_0: away"}


@pytest.mark.parametrize("kind", ["lda", "average", "ensemble"])
def test_a_client_that_misses_the_last_block_gives_no_head(federation: Any, x: Tensor, kind: Any) -> None:
    fed = federation(absent=[("block_1", "client_2")], quorum=0.6, **SMALL)
    method = fusefl_of(head=Head(kind=kind))
    fused = fed.fuse(method)
    assert [len(level) for level in fused.model.recipe["levels"]] == [3, 2]
    features = composed(fed, method, x)
    if kind == "average":
        heads = [fed.upload("block_1", c).group("head") for c in IDS[:2]]
        weight, bias = (torch.stack([head[name] for head in heads]).mean(0) for name in ("weight", "bias"))
        torch.testing.assert_close(predict(fused.model.module(), x), features @ weight.T + bias, rtol=1e-4, atol=1e-4)
    if kind == "lda":
        # The client that was away sees all levels by now and tells the moments of its data.
        assert ("moments", "client_2") in fed.runtime.received
        assert {key.split("/")[1] for key in fed.message("moments", "client_2") if "/" in key} == {"0", "1"}


# --- what clients keep


def states(fed: Any, client_id: str) -> list[Payload]:
    """What a client kept after each exchange that it answered, in order."""
    return [Payload.decode(data) for (c, _), data in fed.states._memory.items() if c == client_id]


def test_clients_keep_what_later_exchanges_need_and_no_more(federation: Any) -> None:
    fed = federation(**SMALL)
    method = fusefl_of(num_blocks=3, local=LocalSGD(num_epochs=3, batch_size=16))
    fed.fuse(method)
    kept = [{"/".join(key.split("/")[: 1 if key.startswith("head") else 2]) for key in s} for s in states(fed, IDS[0])]
    assert kept == [
        {"head", "own/1", "own/2"},
        {"head", "own/2", "columns/0", "fused/0"},
        {"head", "columns/0", "columns/1", "fused/0", "fused/1"},
        {"head", "columns/0", "columns/1", "columns/2", "fused/0", "fused/1", "fused/2"},
    ]
    pieces = cut_spec(fed.spec, 3)
    first = states(fed, IDS[0])[0]
    for k in (1, 2):
        assert sorted(first.group(f"own/{k}")) == sorted(pieces.blocks[k].state_dict())
        before = pieces.blocks[k].state_dict()
        assert any(not torch.equal(t, before[name]) for name, t in first.group(f"own/{k}").items())


def test_later_blocks_go_on_training_instead_of_beginning_anew(
    federation: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fed = federation(**SMALL)
    starts: dict[int, dict[str, Tensor]] = {}
    original = FuseFL._train

    def remembered(self: Any, stage: Stage, frozen: Any, client: Any, num_epochs: int) -> Any:
        if client.id == "client_1":
            whole = {f"{i}/{n}": t.clone() for i, b in enumerate(stage.blocks) for n, t in b.state_dict().items()}
            starts[len(starts)] = {**whole, **{f"head/{n}": t.clone() for n, t in stage.head.state_dict().items()}}
        return original(self, stage, frozen, client, num_epochs)

    monkeypatch.setattr(FuseFL, "_train", remembered)
    fed.fuse(fusefl_of())
    kept = states(fed, "client_1")[0]
    for name, tensor in kept.group("own/1").items():
        assert torch.equal(starts[1][f"0/{name}"], tensor)
    for name, tensor in kept.group("head").items():
        assert torch.equal(starts[1][f"head/{name}"], tensor)


# --- frozen levels


def test_frozen_levels_are_uploaded_once_and_never_move(federation: Any) -> None:
    for frozen_batchnorm in ("eval", "train"):
        fed = federation(**SMALL)
        fused = fed.fuse(fusefl_of(frozen_batchnorm=frozen_batchnorm))
        for column, client_id in enumerate(IDS):
            prefix = f"levels.0.columns.{column}.block."
            for name, tensor in fed.upload("block_0", client_id).group("block").items():
                assert torch.equal(fused.model.state[prefix + name], tensor)
            for name, tensor in states(fed, "client_0")[-1].group(f"fused/0/{client_id}/block").items():
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


@pytest.mark.parametrize("family", ["cnn", "mlp"])
def test_frozen_features_computed_once_or_in_every_batch_give_the_same_training(
    federation: Any, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    cached = federation(family, **FAMILIES[family])
    cached.fuse(fusefl_of())
    monkeypatch.setattr(fusefl, "_CACHE_BYTES", 0)
    fresh = federation(family, **FAMILIES[family])
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


# --- clients with different models


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
    wanted = composed(fed, method, x).double() @ weights.T + biases
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


# --- refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_blocks": 0}, "num_blocks is 0\n  where: method.num_blocks\n  fix:   give at least 1"),
        (
            {"feature_dropout": 1.0},
            "feature_dropout is 1.0\n  where: method.feature_dropout\n  fix:   give a probability in [0, 1)",
        ),
        (
            {"feature_dropout": -0.5},
            "feature_dropout is -0.5\n  where: method.feature_dropout\n  fix:   give a probability in [0, 1)",
        ),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        FuseFL(**settings)
    assert str(caught.value) == message


@pytest.mark.parametrize("points", [None, ("2",)])
def test_a_model_that_cannot_be_cut_so_finely_is_told_before_anybody_trains(
    federation: Any, points: tuple[str, ...] | None
) -> None:
    fed = federation("mlp", width=4, depth=3)
    with pytest.raises(ModelError) as caught:
        fed.fuse(fusefl_of(num_blocks=4, local=LocalSGD(num_epochs=4), points=points))
    assert str(caught.value) == (
        "the model cannot be cut into 4 blocks, at most into 3\n"
        "  where: num_blocks\n"
        "  fix:   use num_blocks: 3 or less, or a deeper model"
        if points is None
        else "1 points make 2 blocks, not 4\n  where: points\n  fix:   give 3 points"
    )
    assert fed.cohort.ledger.exchanges() == []


def test_fewer_epochs_than_blocks(federation: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        federation(**SMALL).fuse(fusefl_of(num_blocks=3))
    assert str(caught.value) == (
        "2 local epochs cannot be divided over 3 exchanges\n  where: method.local.num_epochs\n  fix:   give at least 3"
    )


def test_points_name_the_layers_after_which_to_cut(federation: Any) -> None:
    fed = federation(**SMALL)
    fed.fuse(fusefl_of(num_blocks=3, local=LocalSGD(num_epochs=3, batch_size=16), points=("2", "5")))
    layers = [sorted({name.split(".")[0] for name in fed.upload(f"block_{k}", IDS[0]).group("block")}) for k in (0, 1)]
    assert layers == [["0", "1"], ["3", "4"]]


def test_balance_moves_the_cut(federation: Any) -> None:
    counts = []
    for balance in ("parameters", "compute"):
        fed = federation(num_clients=1, input_shape=(1, 16, 16), norm="none", **SMALL)
        fed.fuse(fusefl_of(balance=balance, head=Head(kind="ensemble")))
        counts.append([len(fed.upload(f"block_{k}", IDS[0]).group("block")) for k in (0, 1)])
    # Weights of the four convolutions: 36, 144, 288, 576; positions: 256, 256, 64, 64. A weight and a bias each.
    assert counts == [[6, 2], [4, 4]]


def test_answers_are_shared_between_heads(federation: Any) -> None:
    fed = federation(**SMALL)
    fed.fuse(fusefl_of(head=Head(kind="ensemble")))
    fed.fuse(fusefl_of(head=Head(kind="average")))
    assert all(entry.from_journal for entry in fed.cohort.ledger.entries)
    fed.fuse(fusefl_of())
    fresh = [entry.exchange for entry in fed.cohort.ledger.entries if not entry.from_journal]
    assert fresh == ["moments"] * 3


def test_a_seed_of_its_own_for_each_client_and_exchange(federation: Any) -> None:
    fed = federation(**SMALL)
    fed.fuse(fusefl_of())
    adaptors = [fed.upload("block_1", c).tensor("adaptor/mix.bias") for c in IDS]
    assert all(not torch.equal(a, b) for a, b in pairwise(adaptors))
    assert all(math.isfinite(float(a.float().sum())) for a in adaptors)
