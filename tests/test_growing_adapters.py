"""Adapters that come one by one: any order, any kill, anyone leaving."""

from __future__ import annotations

import fcntl
import itertools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from adapter_folders import WEIGHTS, assert_equal, deltas, exact, make, make_three
from fedfuse.core.errors import FedfuseError
from fedfuse.fusing import add_adapter, arrivals_of, drop_adapter, fuse_adapters, growing

FILES = ("adapter_model.safetensors", "adapter_config.json", "README.md", "fusion.json", "growing.json")


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Adapters that differ in rank, alpha, rsLoRA and targets."""
    return make_three(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in FILES}


def grown(folder: Path, paths: list[Path], **settings: Any) -> Path:
    weights = {"a": 5.0, "b": 3.0, "c": 2.0}
    for number, path in enumerate(paths):
        add_adapter(folder, path, weight=weights[path.name], **(settings if number == 0 else {}))
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "svd", "rank": 2},
        {"method": "fedex"},
        {"method": "average"},
        {"method": "ties", "rank": 2, "keep_fraction": 0.5},
    ],
    ids=lambda settings: str(settings.get("method", "flora")),
)
def test_all_orders_of_arrival_give_the_same_bits(settings: dict[str, Any], three: list[Path], tmp_path: Path) -> None:
    found = [
        contents(grown(tmp_path / f"fused_{number}", list(order), **settings))
        for number, order in enumerate(itertools.permutations(three))
    ]
    assert len(found) == 6
    assert all(content == found[0] for content in found)
    # And the bits of fusing all at once.
    once = fuse_adapters(three, weights=[5, 3, 2], names=["a", "b", "c"], out=tmp_path / "once", **settings).folder
    assert {name: (once / name).read_bytes() for name in FILES[:-1]} == {n: found[0][n] for n in FILES[:-1]}


def test_it_is_a_whole_adapter_after_every_arrival(three: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "fused"
    for count in (1, 2, 3):
        done = add_adapter(folder, three[count - 1], weight=WEIGHTS[count - 1])
        assert done.folder == folder
        shares = [weight / sum(WEIGHTS[:count]) for weight in WEIGHTS[:count]]
        assert_equal(deltas(folder), exact(three[:count], shares))
    assert [(arrival.name, arrival.weight) for arrival in arrivals_of(folder)] == [("a", 0.5), ("b", 0.3), ("c", 0.2)]
    facts = json.loads((folder / "fusion.json").read_text())
    assert sorted(adapter["name"] for adapter in facts["adapters"]) == ["a", "b", "c"]
    # One version and nothing half done lies there.
    assert len(list((folder / "versions").iterdir())) == 1
    assert not list(folder.glob(".*.part"))


def test_who_leaves_was_never_there(three: list[Path], tmp_path: Path) -> None:
    wanted = contents(grown(tmp_path / "two", [three[0], three[2]]))
    folder = grown(tmp_path / "fused", three)
    drop_adapter(folder, "b")
    assert contents(folder) == wanted
    assert sorted(path.name for path in (folder / "arrivals").iterdir()) == ["a", "c"]
    # It may come back.
    add_adapter(folder, three[1], weight=3)
    assert contents(folder) == contents(grown(tmp_path / "again", three))


def test_the_folder_lives_on_when_the_adapters_are_gone_and_when_it_is_moved(three: list[Path], tmp_path: Path) -> None:
    folder = grown(tmp_path / "fused", three[:2])
    extra = make(tmp_path / "extra" / "c", 2, r=1, targets=("q_proj", "k_proj"), lora_dropout=0.1)
    wanted = contents(grown(tmp_path / "wanted", three))
    (three[0] / "adapter_model.safetensors").write_bytes(b"gone")
    folder.rename(tmp_path / "moved")
    add_adapter(tmp_path / "moved", extra, weight=2)
    assert contents(tmp_path / "moved") == wanted


def test_a_residual_apart_comes_and_goes_with_the_version(three: list[Path], tmp_path: Path) -> None:
    folder = grown(tmp_path / "fused", three, method="fedex", residual="apart")
    assert (folder / "residual" / "adapter_model.safetensors").is_file()
    drop_adapter(folder, "b")
    drop_adapter(folder, "c")
    # The mean of one adapter is that adapter: nothing is missing from it.
    assert not (folder / "residual").is_symlink()
    assert_equal(deltas(folder), exact(three[:1], [1.0]))


# --- killed at any moment


class Killed(BaseException):
    """Stands for the end of the process."""


def die_at(monkeypatch: pytest.MonkeyPatch, step: int) -> Callable[[], int]:
    """Count the steps that change the disk, and die before one of them."""
    count = 0

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **settings: Any) -> Any:
            nonlocal count
            if count == step:
                raise Killed
            count += 1
            return function(*args, **settings)

        return run

    for name in ("_copy", "fuse_adapters", "write_atomically", "_link"):
        monkeypatch.setattr(growing, name, counted(getattr(growing, name)))
    monkeypatch.setattr(os, "replace", counted(os.replace))
    # A killed process tidies nothing up.
    monkeypatch.setattr(shutil, "rmtree", counted(shutil.rmtree))
    return lambda: count


def test_killed_at_any_step_the_old_one_stands_or_the_new_one(three: list[Path], tmp_path: Path) -> None:
    before = contents(grown(tmp_path / "before", three[:2]))
    after = contents(grown(tmp_path / "after", three))
    seen = set()
    for step in range(60):
        folder = grown(tmp_path / f"fused_{step}", three[:2])
        with pytest.MonkeyPatch.context() as patch:
            steps = die_at(patch, step)
            try:
                add_adapter(folder, three[2], weight=2)
                ended = True
            except Killed:
                ended = False
            if ended:
                assert steps() <= step
        found = contents(folder)
        assert found in (before, after)
        seen.add(found == after)
        if ended:
            break
        # The next process takes up where this one was, and sweeps.
        if found == before:
            add_adapter(folder, three[2], weight=2)
        else:
            drop_adapter(folder, "b")
            add_adapter(folder, three[1], weight=3)
        assert contents(folder) == after
        assert len(list((folder / "versions").iterdir())) == 1
        assert not list(folder.glob(".*.part"))
    else:
        raise AssertionError("it never ended")
    assert seen == {True, False}
    assert step > 8


def test_killed_in_the_first_arrival_it_can_begin_again(three: list[Path], tmp_path: Path) -> None:
    wanted = contents(grown(tmp_path / "wanted", three[:1]))
    for step in range(12):
        folder = tmp_path / f"fused_{step}"
        with pytest.MonkeyPatch.context() as patch:
            die_at(patch, step)
            with pytest.raises(Killed):
                add_adapter(folder, three[0], weight=5)
        if not (folder / "current").is_symlink():
            add_adapter(folder, three[0], weight=5)
        assert contents(folder) == wanted


# --- what is refused


def refused(function: Callable[..., Any], *words: Any, **settings: Any) -> str:
    with pytest.raises(FedfuseError) as caught:
        function(*words, **settings)
    return str(caught.value)


def test_the_same_adapter_or_the_same_name_twice(three: list[Path], tmp_path: Path) -> None:
    folder = grown(tmp_path / "fused", three[:2])
    before = contents(folder)
    assert refused(add_adapter, folder, three[0], name="other") == (
        'this adapter is already there, as "a"\n'
        f"  where: {three[0]}\n"
        '  fix:   give each adapter once; to change its weight, drop "a" first'
    )
    other = make(tmp_path / "elsewhere" / "a", 7)
    assert refused(add_adapter, folder, other) == (
        f'there is already an adapter "a"\n  where: {folder}\n  fix:   give this one another name'
    )
    assert contents(folder) == before
    add_adapter(folder, other, name="other")
    assert [arrival.name for arrival in arrivals_of(folder)] == ["a", "b", "other"]


def test_a_bad_adapter_leaves_the_folder_as_it_was(three: list[Path], tmp_path: Path) -> None:
    folder = grown(tmp_path / "fused", three[:2])
    before = contents(folder)
    bad = make(tmp_path / "bad", 8, extra={"base_model.model.head.weight": torch.tensor([float("nan")])})
    said = refused(add_adapter, folder, bad)
    assert said.startswith('the adapter holds NaN or infinity in "base_model.model.head.weight"')
    assert refused(add_adapter, folder, make(tmp_path / "far", 9, base_model_name_or_path="another")).startswith(
        "the adapters have different base models: far has another, a has tiny"
    )
    assert contents(folder) == before
    assert sorted(path.name for path in (folder / "arrivals").iterdir()) == ["a", "b"]
    # And where nothing was, nothing is left.
    refused(add_adapter, tmp_path / "new", bad)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_weight_that_is_none(three: list[Path], tmp_path: Path, weight: float) -> None:
    said = refused(add_adapter, tmp_path / "fused", three[0], weight=weight)
    assert said == f"{weight} is no weight\n  where: weight\n  fix:   give a number above 0"
    assert not (tmp_path / "fused").exists()


@pytest.mark.parametrize("name", ["..", ".hidden", "a/b"])
def test_a_name_that_is_none(three: list[Path], tmp_path: Path, name: str) -> None:
    said = refused(add_adapter, tmp_path / "fused", three[0], name=name)
    assert said == f'"{name}" is no name\n  where: name\n  fix:   give a plain word'


def test_the_rule_is_the_folder_s(three: list[Path], tmp_path: Path) -> None:
    folder = grown(tmp_path / "fused", three[:1], method="svd", rank=2)
    for settings in ({"method": "flora"}, {"rank": 1}, {"method": "svd", "dtype": "float32"}):
        assert refused(add_adapter, folder, three[1], **settings) == (
            'the adapters here are fused by the rule "svd", and the rule is the folder\'s\n'
            f"  where: {folder}\n"
            "  fix:   leave rule, rank and settings out, or begin another folder"
        )
    add_adapter(folder, three[1], method="svd", rank=2)
    assert refused(add_adapter, tmp_path / "merged", three[0], method="merge") == (
        'the rule "merge" changes the base model, so that there is no adapter to grow\n'
        "  where: method\n  fix:   use flora, which is as exact"
    )


def test_what_cannot_be_dropped(three: list[Path], tmp_path: Path) -> None:
    folder = grown(tmp_path / "fused", three[:1])
    assert refused(drop_adapter, folder, "aa") == (
        f'there is no adapter "aa"\n  where: {folder}\n  fix:   did you mean "a"? known: a'
    )
    assert refused(drop_adapter, folder, "a") == (
        f'"a" is the only adapter\n  where: {folder}\n  fix:   delete the whole folder'
    )
    assert refused(drop_adapter, tmp_path / "none", "a") == (
        f"no adapter has come here yet\n  where: {tmp_path / 'none'}\n  fix:   name a folder that adapters joined"
    )


def test_a_plain_adapter_does_not_grow(three: list[Path], tmp_path: Path) -> None:
    before = load_file(three[0] / "adapter_model.safetensors")
    assert refused(add_adapter, three[0], three[1]) == (
        f"the folder holds an adapter that nothing can be added to\n  where: {three[0]}\n"
        "  fix:   name a new folder, and add this adapter to it first"
    )
    assert load_file(three[0] / "adapter_model.safetensors").keys() == before.keys()


def test_one_process_at_a_time(three: list[Path], tmp_path: Path) -> None:
    folder = grown(tmp_path / "fused", three[:1])
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert refused(add_adapter, folder, three[1]) == (
            f"another fedfuse process is using this folder\n  where: {folder}\n  fix:   wait for it, then try again"
        )
    add_adapter(folder, three[1])


def test_a_broken_table(three: list[Path], tmp_path: Path) -> None:
    folder = grown(tmp_path / "fused", three[:1])
    (folder / "growing.json").write_text('{"arrivals": [{}]}')
    said = refused(add_adapter, folder, three[1])
    assert said.startswith("growing.json is broken: ")
    assert said.endswith(f"  where: {folder}\n  fix:   copy the folder again")
