"""Examples and the fingerprints that decide whether an earlier answer counts."""

from __future__ import annotations

import pytest
import torch

from fedfuse.core.errors import DataError
from fedfuse.core.examples import ClientData, Examples


def examples(seed: int = 0, n: int = 4) -> Examples:
    x = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return Examples(x, torch.arange(n) % 2)


def test_inputs_and_labels_must_be_of_one_length() -> None:
    with pytest.raises(DataError) as caught:
        Examples(torch.zeros(3, 2), torch.zeros(2, dtype=torch.int64))
    assert str(caught.value) == "3 inputs came with 2 labels\n  fix:   give one label per input"


def test_a_subset_is_a_copy() -> None:
    whole = examples()
    part = whole.subset([2, 0])
    assert part.y.tolist() == [0, 0]
    assert part.x.equal(whole.x[[2, 0]])
    part.x.zero_()
    assert whole.x.abs().sum() > 0
    assert len(whole.subset([])) == 0


def test_a_fingerprint_sees_contents_shapes_and_dtypes() -> None:
    base = examples()
    assert base.fingerprint == examples().fingerprint
    turned = Examples(base.x.T.contiguous().T, base.y)
    assert not turned.x.is_contiguous()
    assert turned.fingerprint == base.fingerprint
    different = [
        examples(seed=1),
        Examples(base.x.reshape(4, 3, 1), base.y),
        Examples(base.x, base.y + 1),
        Examples(base.x, base.y.int()),
        Examples(base.x.to(torch.bfloat16), base.y),
        base.subset([1, 0, 2, 3]),
        base.subset([]),
    ]
    assert len({each.fingerprint for each in [base, *different]}) == 1 + len(different)


def test_the_fingerprint_of_a_client_sees_how_its_data_is_used() -> None:
    a, b = examples(0), examples(1)
    variants = [
        ClientData(a, b, 2),
        ClientData(b, a, 2),
        ClientData(a, a, 2),
        ClientData(a, b, 3),
        ClientData(a, b, 2, augment="flip"),
    ]
    assert len({each.fingerprint for each in variants}) == len(variants)
    assert ClientData(examples(0), examples(1), 2).fingerprint == variants[0].fingerprint
