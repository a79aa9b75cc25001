"""Seeding: derived from names, never consumed."""

from __future__ import annotations

import hashlib
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.core.seeding import Rng, derive_seed

PARTS = st.lists(st.integers(-(2**70), 2**70) | st.text(max_size=6), max_size=4)


def test_a_seed_is_the_hash_of_its_names() -> None:
    digest = hashlib.sha256(b'[0,"a",1]').digest()
    assert derive_seed(0, "a", 1) == int.from_bytes(digest[:8], "big") >> 1


@given(PARTS, PARTS)
def test_seeds_are_in_range_and_differ_where_the_names_do(a: list[int | str], b: list[int | str]) -> None:
    assert 0 <= derive_seed(*a) < 2**63
    assert (derive_seed(*a) == derive_seed(*b)) == (a == b)


def test_a_number_is_not_its_text() -> None:
    assert derive_seed(1) != derive_seed("1")
    assert derive_seed("a", "b") != derive_seed("ab")
    assert derive_seed("a,b") != derive_seed("a", "b")


def test_a_stream_does_not_depend_on_what_was_drawn_before() -> None:
    rng = Rng(3)
    first = {name: torch.rand(2, generator=rng.torch(name)) for name in ("a", "b")}
    second = {name: torch.rand(2, generator=rng.torch(name)) for name in ("b", "a")}
    assert all(first[name].equal(second[name]) for name in first)
    assert not first["a"].equal(first["b"])
    assert rng.numpy("a").random() == rng.numpy("a").random()
    assert rng.numpy("a").random() != rng.numpy("b").random()


def test_children_have_streams_of_their_own() -> None:
    rng = Rng(3)
    assert rng.child("a", 1) == Rng(derive_seed(3, "a", 1))
    assert rng.child("a").child("b") != rng.child("a", "b")
    assert rng.child("a") != rng.child("b")


def draw() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(()))  # noqa: NPY002


def test_ambient_seeds_all_three_generators() -> None:
    with Rng(5).ambient("x"):
        first = draw()
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    torch.manual_seed(1)
    with Rng(5).ambient("x"):
        second = draw()
    with Rng(5).ambient("y"):
        third = draw()
    assert first == second
    assert all(a != b for a, b in zip(first, third, strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_ambient_puts_all_three_generators_back(fails: bool) -> None:
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    expected = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    try:
        with Rng(5).ambient("x"):
            draw()
            if fails:
                raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert draw() == expected


def test_ambient_may_be_nested() -> None:
    with Rng(1).ambient("outer"):
        whole = draw(), draw()
    with Rng(1).ambient("outer"):
        first = draw()
        with Rng(1).ambient("inner"):
            draw()
        second = draw()
    assert (first, second) == whole
