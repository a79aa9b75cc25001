"""Parts of tensors by hand."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.ops.slices import is_part, mean_where_held, part_of, places


def test_a_part_is_the_first_corner() -> None:
    whole = torch.arange(12).view(3, 4)
    assert part_of(whole, (2, 3)).tolist() == [[0, 1, 2], [4, 5, 6]]
    assert part_of(torch.tensor(7), ()).item() == 7


def test_of_joined_queries_keys_and_values_it_is_the_first_of_each() -> None:
    joined = torch.arange(12)
    assert part_of(joined, (6,), {0: 3}).tolist() == [0, 1, 4, 5, 8, 9]
    assert not is_part((5,), (12,), {0: 3})
    assert not is_part((2,), (2, 2))


def test_a_part_is_a_copy() -> None:
    whole = torch.zeros(3)
    part_of(whole, (2,)).fill_(1)
    assert whole.tolist() == [0, 0, 0]


def test_each_number_is_averaged_over_those_who_hold_it() -> None:
    whole = torch.full((2, 2), 9.0)
    parts = [torch.tensor([[1.0]]), torch.tensor([[3.0, 5.0]])]
    # Weights 1 and 3: (1 + 9) / 4; then only the second; then nobody.
    assert mean_where_held(whole, parts, [1, 3], {}).tolist() == [[2.5, 5.0], [9.0, 9.0]]
    assert mean_where_held(whole, [], [], {}).tolist() == whole.tolist()


def test_integers_are_rounded_and_keep_their_kind() -> None:
    found = mean_where_held(torch.tensor(0), [torch.tensor(3), torch.tensor(4)], [1.0, 2.0], {})
    assert found.dtype == torch.int64
    assert found.item() == 4


@given(sizes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 3)), min_size=1, max_size=3), num=st.integers(1, 3))
def test_what_is_cut_out_is_put_back_where_it_was(sizes: list[tuple[int, int]], num: int) -> None:
    whole_shape = [num * (a + b) for a, b in sizes]
    shape = [num * a for a, _ in sizes]
    packs = {0: num}
    whole = torch.arange(torch.Size(whole_shape).numel()).double().view(whole_shape)
    part = part_of(whole, shape, packs)
    assert list(part.shape) == shape
    assert torch.equal(mean_where_held(whole, [part], [2.0], packs), whole)
    assert torch.equal(whole[places(shape, whole_shape, packs)], part)
