"""``fedfuse fuse NEW --into FOLDER``."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from adapter_folders import assert_equal, deltas, exact, make_three
from fedfuse.commands.growing import grow_and_tell
from fedfuse.core.errors import ConfigError

pytestmark = pytest.mark.filterwarnings("ignore:'click:DeprecationWarning")


def grow(paths: list[Path], into: Path, **others: Any) -> list[str]:
    screen = io.StringIO()
    grow_and_tell([str(p) for p in paths], into, console=Console(file=screen, width=160, soft_wrap=True), **others)
    return screen.getvalue().splitlines()


def test_it_tells_what_is_there_after_every_arrival(tmp_path: Path) -> None:
    three, into = make_three(tmp_path), tmp_path / "fused"
    said = grow(three[:1], into, weights="5")
    assert said[0] == "flora against the exact weighted sum:"
    assert said[-1] == "1 adapter so far: a 1"
    assert grow(three[1:], into, weights="3,2")[-1] == "3 adapters so far: a 0.5, b 0.3, c 0.2"
    assert_equal(deltas(into), exact(three, [0.5, 0.3, 0.2]))
    assert grow([], into, drop=["b"])[-1] == "2 adapters so far: a 0.714, c 0.286"
    assert grow([three[1]], into, weights="3", name="again")[-1] == "3 adapters so far: a 0.5, again 0.3, c 0.2"
    assert f"wrote {into}: " in "\n".join(said)


def test_words_that_do_not_fit(tmp_path: Path) -> None:
    def said(*paths: str, **others: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            grow_and_tell(paths, tmp_path / "fused", **others)
        assert not (tmp_path / "fused").exists()
        return str(caught.value)

    assert said() == "no adapter joins or leaves\n  where: --into\n  fix:   name an adapter, or give --drop NAME"
    assert said("a", "b", name="c") == (
        "there are 2 adapters for one name\n  where: --name\n  fix:   let them join in turn"
    )
    assert said("a", "b", weights="1") == (
        "there are 1 weights for 2 adapters\n  where: --weights\n  fix:   give one per adapter"
    )


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from fedfuse.cli import main

    def fedfuse(*words: str | Path) -> str:
        monkeypatch.setattr("sys.argv", ["fedfuse", *map(str, words)])
        with pytest.raises(SystemExit):
            main()
        found = capsys.readouterr()
        return found.out + found.err

    three, into = make_three(tmp_path), tmp_path / "fused"
    fedfuse("fuse", three[0], "--into", into, "--method", "svd", "--rank", "2", "--weight", "3")
    assert "2 adapters so far: a 0.75, b 0.25" in fedfuse("fuse", three[1], "--into", into)
    assert "1 adapter so far: b 1" in fedfuse("fuse", "--into", into, "--drop", "a")
    assert "a growing folder is its own result, of adapters alone" in fedfuse(
        "fuse", three[0], "--into", into, "--out", tmp_path / "x"
    )
    assert "only a growing folder calls adapters by names" in fedfuse("fuse", three[0], "--drop", "a")
    assert "there is nothing to fuse" in fedfuse("fuse")
