"""Uploads that look wrong, by hand; and honest clients, however different, are left in peace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fedfuse.analysis import Screening
from fedfuse.core.artifact import detached_state
from fedfuse.core.payload import Payload, Value
from fedfuse.models import spec

MODEL = spec("cnn", {"width": 4, "depth": 2}, input_shape=(1, 8, 8), num_classes=3, seed=0)
FIRST = detached_state(MODEL.build())
BUFFERS = {name for name, _ in MODEL.build().named_buffers()}


def look(uploads: dict[str, Any], sent: Payload | None = None) -> dict[str, list[str]]:
    """Client to what looks wrong in its upload."""
    screening = Screening(lambda client_id: MODEL)
    payloads: dict[str, Payload] = {name: Payload(upload) for name, upload in uploads.items()}
    digests = {name: payload.digest() for name, payload in payloads.items()}
    suspects = screening.look("ask", dict.fromkeys(payloads, sent or Payload()), payloads, digests)
    assert screening.suspects == suspects
    assert {suspect.exchange for suspect in suspects} <= {"ask"}
    found: dict[str, list[str]] = {}
    for suspect in suspects:
        found.setdefault(suspect.client, []).append(suspect.reason)
    return found


def change(seed: int) -> dict[str, Tensor]:
    """What an honest client adds to the first weights: partly what all add."""
    common, own = torch.Generator().manual_seed(99), torch.Generator().manual_seed(seed)
    return {
        name: 0.1 * (torch.randn(t.shape, generator=common) + torch.randn(t.shape, generator=own))
        for name, t in FIRST.items()
        if name not in BUFFERS
    }


def trained(seed: int, factor: float = 1.0, **others: Value) -> dict[str, Value]:
    added = change(seed)
    state = {f"model/{name}": t + factor * added[name] if name in added else t for name, t in FIRST.items()}
    return {**state, "num_examples": 100, **others}


def honest(count: int = 7) -> dict[str, dict[str, Value]]:
    return {f"c{seed}": trained(seed) for seed in range(count)}


def test_honest_clients_are_left_in_peace() -> None:
    assert look(honest()) == {}


@pytest.mark.parametrize(
    ("factor", "reason"),
    [
        (10.0, "it goes 9.5 times as far as is usual here"),
        (1e-3, "it is next to nothing: 0.00097 times what is usual here"),
        (-1.0, "it goes against the others: its cosine to them is -0."),
    ],
)
def test_too_far_next_to_nothing_and_the_other_way(factor: float, reason: str) -> None:
    found = look({**honest(), "evil": trained(50, factor)})
    assert list(found) == ["evil"]
    assert found["evil"][0].startswith(reason)
    assert len(found["evil"]) == 1


def test_two_reasons_at_a_time() -> None:
    found = look({**honest(), "evil": trained(50, -6.0)})
    assert [reason[:16] for reason in found["evil"]] == ["it goes 5.7 time", "it goes against "]


def test_noise_has_nothing_in_common_with_the_others() -> None:
    g = torch.Generator().manual_seed(777)
    noise = {
        f"model/{name}": t + (0.14 * torch.randn(t.shape, generator=g) if name not in BUFFERS else 0)
        for name, t in FIRST.items()
    }
    assert look({**honest(), "evil": {**noise, "num_examples": 100}}) == {
        "evil": ["it has no more in common with the others than noise would"]
    }


def test_where_nobody_agrees_nobody_is_accused_of_disagreeing() -> None:
    g = torch.Generator().manual_seed(1)
    alone = {
        f"c{k}": {f"model/{name}": t + 0.1 * torch.randn(t.shape, generator=g) for name, t in FIRST.items()}
        for k in range(8)
    }
    for upload in alone.values():
        upload |= {f"model/{name}": FIRST[name] for name in BUFFERS}
    assert look(alone) == {}


def test_a_client_with_many_examples_may_go_far() -> None:
    far = trained(50, 5.0)
    assert list(look({**honest(), "big": far})) == ["big"]
    assert look({**honest(), "big": {**far, "num_examples": 2500}}) == {}
    near = trained(50, 0.04)
    assert list(look({**honest(), "small": near})) == ["small"]
    assert look({**honest(), "small": {**near, "num_examples": 1}}) == {}


def test_it_begins_at_what_was_sent() -> None:
    sent = Payload({f"model/{name}": t + 5 for name, t in FIRST.items()})
    moved = {
        name: {key: value + 5 if isinstance(value, Tensor) else value for key, value in upload.items()}
        for name, upload in honest().items()
    }
    assert look(moved, sent) == {}
    assert list(look({**moved, "evil": {**dict(sent), "num_examples": 9}}, sent)) == ["evil"]


def test_statistics_that_nobody_was_sent() -> None:
    g = torch.Generator().manual_seed(0)
    sums = torch.rand(20, 20, generator=g)
    uploads = {f"c{k}": {"sums": k * (sums + 0.1 * torch.rand(20, 20, generator=g))} for k in (1, 2, 5, 30, 90)}
    assert look(uploads) == {}
    found = look({**uploads, "evil": {"sums": -sums}, "idle": {"sums": 1e-6 * sums}})
    assert [(name, reasons[0][:20]) for name, reasons in found.items()] == [
        ("evil", "it goes against the "),
        ("idle", "it is next to nothin"),
    ]


def test_copies_are_told_of_both() -> None:
    found = look({**honest(), "d1": trained(0), "d2": trained(0)})
    assert found == {
        "c0": ["it is the same as that of d1, d2, byte for byte"],
        "d1": ["it is the same as that of c0, d2, byte for byte"],
        "d2": ["it is the same as that of c0, d1, byte for byte"],
    }
    many = look({f"c{k}": trained(0) for k in range(6)})
    assert many["c0"] == ["it is the same as that of c1, c2, c3 and 2 more, byte for byte"]


def test_small_uploads_may_be_equal_by_chance() -> None:
    assert look({f"c{k}": {"num_examples": 5, "counts": torch.tensor([2, 3]), "x": torch.ones(3)} for k in "ab"}) == {}


def test_oddities_of_a_single_upload() -> None:
    variance = next(name for name in BUFFERS if name.endswith("running_var"))
    uploads = {
        "counts": trained(1, label_counts=torch.tensor([30, 30, 30])),
        "fine": {**trained(2, label_counts=torch.tensor([50, 50, 0])), "curve/train_loss": torch.tensor([2.3, 0.1])},
        "loss": {**trained(3), "curve/train_loss": torch.tensor([2.0, 5.0])},
        "negative": trained(4, label_counts=torch.tensor([-10, 50, 60])),
        "variance": {**trained(5), f"model/{variance}": torch.full_like(FIRST[variance], -1.0)},
    }
    assert look(uploads) == {
        "counts": ["its label counts add up to 90, and it claims 100 examples"],
        "loss": ["its training loss rose from 2 to 5"],
        "negative": ["it counts fewer than 0 examples of a class"],
        "variance": [f'a running variance is below 0, in "model/{variance}"'],
    }


def test_few_clients_and_models_of_different_kinds_are_not_compared() -> None:
    assert look({**honest(3), "evil": trained(50, 100.0)}) == {}
    others = {f"d{k}": {"model/w": torch.full((9,), 10.0**k)} for k in range(4)}
    assert look({**honest(4), **others}) == {}


def test_scalars_empty_tensors_and_integers_are_passed_over() -> None:
    row: dict[str, Value] = {
        "n": 1,
        "word": "x",
        "flag": True,
        "num_examples": True,
        "none": torch.zeros(0),
        "k": torch.tensor(3),
    }
    assert look(dict.fromkeys("abcdef", row)) == {}


def test_as_json() -> None:
    screening = Screening(lambda client_id: MODEL)
    payloads = {name: Payload(trained(1, label_counts=torch.tensor([1]))) for name in "a"}
    (suspect,) = screening.look("ask", {"a": Payload()}, payloads, {"a": "x"})
    assert suspect.to_json() == {
        "client": "a",
        "exchange": "ask",
        "reason": "its label counts add up to 1, and it claims 100 examples",
        "numbers": {"label_counts": 1.0, "num_examples": 100.0},
    }


@pytest.mark.parametrize("group", ["change", "projection", "seeds"])
def test_numbers_that_mean_something_else_at_every_client_are_not_compared(group: str) -> None:
    draw = torch.Generator().manual_seed(0)
    numbers = {f"c{c}": torch.randn(500, generator=draw) for c in range(7)}

    assert look({c: {f"{group}/values": values, "num_examples": 100} for c, values in numbers.items()}) == {}
