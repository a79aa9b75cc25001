"""``fedfuse fuse`` and ``fedfuse inspect`` on files that people already have."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from adapter_folders import (
    make_three,
    save_base,
)
from fedfuse.core.payload import Payload


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Adapters that differ in rank, alpha, rsLoRA and targets."""
    return make_three(tmp_path)


# --- the command


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def run(*words: str | Path) -> tuple[int, str, str]:
        from fedfuse.cli import main

        monkeypatch.setattr("sys.argv", ["fedfuse", *map(str, words)])
        monkeypatch.setenv("COLUMNS", "160")
        code = 0
        try:
            main()
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else 1
        found = capsys.readouterr()
        return code, found.out, found.err

    return run


@pytest.mark.filterwarnings("ignore:'click:DeprecationWarning")
def test_the_command_fuses_and_tells_how_exactly(
    cli: Callable[..., tuple[int, str, str]], three: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "fused"
    code, said, _ = cli("fuse", *three, "--method", "svd", "--rank", 2, "--weights", "0.5,0.3,0.2", "--out", out)
    assert code == 0
    assert said.splitlines()[0] == "svd against the exact weighted sum:"
    assert re.search(r"^model\.layers\.0\.self_attn\.q_proj +2 +\d+\.\d\d %$", said, flags=re.MULTILINE)
    assert re.search(r"^all together +\d+\.\d\d %$", said, flags=re.MULTILINE)
    assert said.splitlines()[-1].startswith(f"wrote {out}: ")
    code, said, _ = cli("inspect", out)
    assert code == 0
    assert f"adapter {out}: LoRA\n  base model  tiny\n  rank        1 to 2\n" in said
    assert "  targets     k_proj, q_proj, v_proj (6 weights)\n" in said
    assert "  fused by    svd of 3 adapters\n" in said
    code, said, _ = cli("fuse", *three, "--compare")
    assert (code, said.splitlines()[0]) == (0, "every rule against the exact weighted sum, before rounding:")
    assert re.search(r"^flora +6 +576 +0$", said, flags=re.MULTILINE)


@pytest.mark.filterwarnings("ignore:'click:DeprecationWarning")
def test_the_command_fuses_checkpoints(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    save_base(tmp_path / "one")
    save_base(tmp_path / "two")
    words = [tmp_path / "one", tmp_path / "two", "--method", "slerp", "--out", tmp_path / "fused"]
    assert cli("fuse", *words) == (0, f"wrote {tmp_path / 'fused'}\n", "")


@pytest.mark.filterwarnings("ignore:'click:DeprecationWarning")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "there is no folder for the result"),
        (["--out", "x", "--weights", "1,b"], '"1,b" are no weights'),
        (["--out", "x", "--set", "scaling"], '"scaling" is no setting'),
        (["--out", "x", "--set", "rank=2"], '"rank" is no setting of a rule\n  where: --set\n  fix:   use --rank'),
        (["--out", "x", "--config", "c.yaml", "--rank", "2"], "these options are for files without a configuration"),
    ],
)
def test_words_that_make_no_fusion(
    cli: Callable[..., tuple[int, str, str]], three: list[Path], words: list[str], said: str
) -> None:
    code, _, wrong = cli("fuse", *three, *words)
    assert code == 2
    assert wrong.startswith(f"error: {said}")


@pytest.mark.filterwarnings("ignore:'click:DeprecationWarning")
def test_contributions_need_a_configuration(cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    (tmp_path / "a.fed").write_bytes(Payload({}).encode())
    assert cli("fuse", tmp_path, "--out", tmp_path / "x")[2] == (
        f"error: contributions are fused with the federation's configuration\n  where: {tmp_path}\n"
        "  fix:   give --config\n"
    )
