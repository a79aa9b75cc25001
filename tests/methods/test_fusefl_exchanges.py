"""FuseFL: what crosses, who may leave, and what clients keep."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from fedfuse.core.payload import Payload, read_header
from fedfuse.methods.fusefl import FuseFL, Stage, messages_for
from fedfuse.methods.heads import Head
from fedfuse.methods.tasks import read_moments
from fedfuse.models.blocks import cut_spec
from fedfuse.ops.moments import lda_head, pool
from fedfuse.training import LocalSGD, predict

SETTINGS = LocalSGD(num_epochs=2, batch_size=16)
SMALL = {"width": 4, "depth": 4}
IDS = ["client_0", "client_1", "client_2"]


def fusefl_of(**settings: Any) -> FuseFL:
    return FuseFL(**{"num_blocks": 2, "local": SETTINGS, **settings})


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
    wanted = fed.composed(method, x).double() @ weights.T + biases
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
    features = fed.composed(method, x)
    if kind == "average":
        heads = [fed.upload("block_1", c).group("head") for c in IDS[:2]]
        weight, bias = (torch.stack([head[name] for head in heads]).mean(0) for name in ("weight", "bias"))
        torch.testing.assert_close(predict(fused.model.module(), x), features @ weight.T + bias, rtol=1e-4, atol=1e-4)
    if kind == "lda":
        # The client that was away sees all levels by now and tells the moments of its data.
        assert ("moments", "client_2") in fed.runtime.received
        assert {key.split("/")[1] for key in fed.message("moments", "client_2") if "/" in key} == {"0", "1"}


# --- what clients keep


def test_clients_keep_what_later_exchanges_need_and_no_more(federation: Any) -> None:
    fed = federation(**SMALL)
    method = fusefl_of(num_blocks=3, local=LocalSGD(num_epochs=3, batch_size=16))
    fed.fuse(method)
    kept = [{"/".join(key.split("/")[: 1 if key.startswith("head") else 2]) for key in s} for s in fed.kept(IDS[0])]
    assert kept == [
        {"head", "own/1", "own/2"},
        {"head", "own/2", "columns/0", "fused/0"},
        {"head", "columns/0", "columns/1", "fused/0", "fused/1"},
        {"head", "columns/0", "columns/1", "columns/2", "fused/0", "fused/1", "fused/2"},
    ]
    pieces = cut_spec(fed.spec, 3)
    first = fed.kept(IDS[0])[0]
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
    kept = fed.kept("client_1")[0]
    for name, tensor in kept.group("own/1").items():
        assert torch.equal(starts[1][f"0/{name}"], tensor)
    for name, tensor in kept.group("head").items():
        assert torch.equal(starts[1][f"head/{name}"], tensor)
