"""Fusing uploads: key by key, chunk by chunk, with the uploads' own dtypes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.core.errors import ModelError
from fedfuse.core.payload import Payload, PayloadFile
from fedfuse.core.registry import RULES
from fedfuse.rules import Rule, fuse_uploads, rule
from fedfuse.rules.mean import Mean
from fedfuse.rules.median import Median
from fedfuse.rules.trimmed_mean import TrimmedMean

ALL = [Mean(), Median(), TrimmedMean()]
SAME = "\n  fix:   fuse uploads of the same architecture"


def random_uploads(count: int, seed: int = 0) -> list[Payload]:
    g = torch.Generator().manual_seed(seed)
    return [
        Payload(
            {
                "model/w": torch.randn(5, 7, generator=g),
                "model/half": torch.randn(9, generator=g).bfloat16(),
                "model/steps": torch.randint(0, 100, (), generator=g),
                "model/mask": torch.rand(4, generator=g) > 0.5,
                "other/w": torch.randn(2, generator=g),
                "n": 3,
            }
        )
        for _ in range(count)
    ]


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(a[k].equal(b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("which", ALL, ids=lambda r: type(r).__name__)
class TestEveryRule:
    def test_it_keeps_names_shapes_and_dtypes(self, which: Rule) -> None:
        fused = fuse_uploads(random_uploads(4), which)
        assert {name: (tuple(x.shape), x.dtype) for name, x in fused.items()} == {
            "half": ((9,), torch.bfloat16),
            "mask": ((4,), torch.bool),
            "steps": ((), torch.int64),
            "w": ((5, 7), torch.float32),
        }

    @pytest.mark.parametrize("count", [1, 2, 3, 7, 10])
    def test_identical_models_give_that_very_model(self, which: Rule, count: int) -> None:
        one = random_uploads(1)[0]
        assert equal(fuse_uploads([one] * count, which), one.group("model"))

    def test_small_chunks_change_no_bit(self, which: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
        uploads = random_uploads(5)
        whole = fuse_uploads(uploads, which)
        for chunk_bytes in (1, 8 * 5 * 4, 8 * 5 * 34, 8 * 5 * 36):
            monkeypatch.setattr(rule, "_CHUNK_BYTES", chunk_bytes)
            assert equal(fuse_uploads(uploads, which), whole)

    def test_files_give_the_same_as_memory(self, which: Rule, tmp_path: Path) -> None:
        uploads = random_uploads(3)
        paths = [str(tmp_path / str(number)) for number in range(3)]
        for path, upload in zip(paths, uploads, strict=True):
            Path(path).write_bytes(upload.encode())
        assert equal(fuse_uploads([PayloadFile(path) for path in paths], which), fuse_uploads(uploads, which))

    def test_the_uploads_are_left_as_they_are(self, which: Rule) -> None:
        uploads = random_uploads(3)
        before = [upload.digest() for upload in uploads]
        fuse_uploads(uploads, which)
        assert [upload.digest() for upload in uploads] == before

    def test_the_order_of_the_clients_does_not_matter(self, which: Rule) -> None:
        stack = torch.randn(6, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        weights = torch.full((6,), 1 / 6, dtype=torch.float64)
        turned = stack[torch.randperm(6, generator=torch.Generator().manual_seed(2))]
        torch.testing.assert_close(which.fuse(turned, weights), which.fuse(stack, weights), rtol=0, atol=1e-14)

    def test_the_result_is_between_the_clients_values(self, which: Rule) -> None:
        stack = torch.randn(5, 50, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        fused = which.fuse(stack, torch.full((5,), 0.2, dtype=torch.float64))
        assert bool((fused >= stack.min(0).values - 1e-12).all())
        assert bool((fused <= stack.max(0).values + 1e-12).all())

    def test_empty_tensors_and_empty_groups(self, which: Rule) -> None:
        fused = fuse_uploads([Payload({"model/e": torch.zeros(0, 3)})] * 2, which)
        assert fused["e"].shape == (0, 3)
        assert fuse_uploads([Payload({"n": 1})] * 2, which) == {}


def test_the_built_in_rules() -> None:
    assert [RULES.get(name) for name in ("mean", "median", "trimmed_mean")] == [Mean, Median, TrimmedMean]


def test_a_rule_of_ones_own_needs_a_body() -> None:
    with pytest.raises(NotImplementedError):
        fuse_uploads(random_uploads(2), Rule())


def test_integers_are_rounded_and_flags_follow_the_majority() -> None:
    uploads = [
        Payload({"model/i": torch.tensor([1, 2, 0]), "model/f": torch.tensor([flag, not flag])})
        for flag in (True, True, False)
    ]
    uploads[2] = Payload({"model/i": torch.tensor([2, 4, 1]), "model/f": torch.tensor([False, True])})
    fused = fuse_uploads(uploads, Mean())
    assert fused["i"].tolist() == [1, 3, 0]
    assert fused["f"].tolist() == [True, False]


def test_channels_last_tensors_keep_their_values() -> None:
    x = torch.arange(24.0).reshape(1, 2, 3, 4)
    fused = fuse_uploads([Payload({"model/x": x.contiguous(memory_format=torch.channels_last)})] * 2, Mean())
    assert fused["x"].equal(x)


def test_other_groups() -> None:
    uploads = random_uploads(2)
    assert list(fuse_uploads(uploads, Mean(), group="other")) == ["w"]
    states = [upload.group("model") for upload in uploads]
    assert equal(fuse_uploads(states, Mean(), group=""), fuse_uploads(uploads, Mean()))


# --- what cannot be fused


def problem(uploads: Sequence[Any], weights: Sequence[float] | None = None) -> str:
    with pytest.raises(ModelError) as caught:
        fuse_uploads(uploads, Mean(), weights)
    return str(caught.value)


def test_nothing_to_fuse() -> None:
    assert problem([]) == "there is nothing to fuse\n  fix:   give at least one upload"


@pytest.mark.parametrize(
    ("weights", "shown"),
    [
        ([1.0], "1 weights for 2 uploads: [1.0]"),
        ([], "0 weights for 2 uploads: []"),
        ([1.0, -1.0], "2 weights for 2 uploads: [1.0, -1.0]"),
        ([0.0, 0.0], "2 weights for 2 uploads: [0.0, 0.0]"),
        ([1.0, math.nan], "2 weights for 2 uploads: [1.0, nan]"),
        ([1.0, math.inf], "2 weights for 2 uploads: [1.0, inf]"),
    ],
)
def test_weights_that_cannot_be(weights: list[float], shown: str) -> None:
    fix = "\n  fix:   give one weight per upload, none negative, not all zero"
    assert problem(random_uploads(2), weights) == shown + fix


def test_uploads_that_differ_are_named() -> None:
    a = Payload({"model/w": torch.zeros(2)})
    has = 'upload 2 has {} as "model/w", upload 0 has (2,) torch.float32'
    assert problem([a, a, Payload()]) == has.format("nothing") + SAME
    assert problem([a, a, Payload({"model/w": 1})]) == has.format("nothing") + SAME
    assert problem([a, a, Payload({"model/w": torch.zeros(3)})]) == has.format("(3,) torch.float32") + SAME
    assert problem([a, a, Payload({"model/w": torch.zeros(2).half()})]) == has.format("(2,) torch.float16") + SAME
    more = Payload({**a, "model/x": torch.zeros(1)})
    assert problem([a, a, more]) == 'upload 2 and upload 0 do not both hold "model/x"' + SAME


def test_an_empty_tensor_does_not_hide_a_difference() -> None:
    a, b = Payload({"model/w": torch.zeros(0)}), Payload({"model/w": torch.zeros(2)})
    assert problem([a, b]) == 'upload 1 has (2,) torch.float32 as "model/w", upload 0 has (0,) torch.float32' + SAME


def test_other_keys_may_differ() -> None:
    a, b = random_uploads(2)
    del b["other/w"]
    fuse_uploads([a, b], Mean())


# --- properties

NUMBERS = st.floats(-1e6, 1e6, width=32)


@given(st.lists(st.tuples(NUMBERS, st.floats(0.01, 100)), min_size=1, max_size=8), st.randoms(use_true_random=False))
def test_clients_may_be_permuted_together_with_their_weights(clients: list[tuple[float, float]], random: Any) -> None:
    def fuse(pairs: list[tuple[float, float]], which: Rule) -> float:
        uploads = [{"model/x": torch.tensor([value], dtype=torch.float64)} for value, _ in pairs]
        return float(fuse_uploads(uploads, which, [weight for _, weight in pairs])["x"])

    shuffled = list(clients)
    random.shuffle(shuffled)
    largest = max(abs(value) for value, _ in clients)
    assert fuse(shuffled, Median()) == fuse(clients, Median())
    for which in (Mean(), TrimmedMean()):
        assert fuse(shuffled, which) == pytest.approx(fuse(clients, which), rel=1e-12, abs=1e-12 * max(1.0, largest))


@given(NUMBERS, st.lists(st.floats(0.01, 1e6), min_size=1, max_size=20))
def test_identical_values_come_back_whatever_the_weights(value: float, weights: list[float]) -> None:
    uploads = [{"model/x": torch.tensor([value])}] * len(weights)
    for which in ALL:
        assert fuse_uploads(uploads, which, weights)["x"].equal(torch.tensor([value]))


@given(st.lists(NUMBERS, min_size=1, max_size=8), st.floats(0.01, 100))
def test_only_the_ratio_of_the_weights_counts(values: list[float], scale: float) -> None:
    uploads = [{"model/x": torch.tensor([value], dtype=torch.float64)} for value in values]
    weights = [1.0 + i for i in range(len(values))]
    a = float(fuse_uploads(uploads, Mean(), weights)["x"])
    b = float(fuse_uploads(uploads, Mean(), [scale * weight for weight in weights])["x"])
    assert a == pytest.approx(b, rel=1e-12, abs=1e-12 * max(1.0, *map(abs, values)))
