"""``fedfuse diagnose``: what it prints, and what it refuses."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

import fedfuse
from fedfuse.commands.diagnosing import diagnose_and_tell, print_diagnosis
from fedfuse.core.errors import ConfigError
from fedfuse.experiment import Observer

# Of typer's import of click, where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:'click:DeprecationWarning")


def printed(table: dict[str, Any]) -> str:
    stream = io.StringIO()
    print_diagnosis(table, Console(file=stream, width=120))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def test_one_setting_is_printed_with_its_words() -> None:
    diagnosis = {
        "smoothness": 7.694,
        "update_size": 0.25,
        "num_steps": 20.0,
        "num_parameters": 1234,
        "predicted_gap": 0.126,
        "verdict": "enough",
        "sentences": ["One round should be enough.", "Because."],
    }
    lines = printed({"settings": [{"varied": {}, "diagnosis": diagnosis, "measured": None}], "num_rounds": 4})
    assert [" ".join(line.split()) for line in lines.splitlines() if line] == [
        "L, largest curvature 7.69",
        "τ, relative update 0.25",
        "Tk, local steps 20",
        "trained numbers 1,234",
        "predicted gap 13 %",
        "one round enough",
        "One round should be enough.",
        "Because.",
    ]


def test_what_was_measured_stands_beside_each_setting() -> None:
    settings = [
        {
            "varied": {"model.width": width},
            "diagnosis": {"predicted_gap": 0.5, "mean_length": 2.0, "verdict": "open", "sentences": ["Open."]},
            "measured": {
                "distance": 1.0,
                "accuracy_one": 0.8,
                "accuracy_many": 0.9,
                "accuracy_gap": 0.1,
                "accuracy_gap_std": spread,
                "upload_bytes_one": 1024,
                "upload_bytes_many": 10240,
            },
        }
        for width, spread in ((4, 0.0), (8, 0.02))
    ]
    text = " ".join(printed({"settings": settings, "num_rounds": 10}).split())
    assert "width 4 width 8" in text
    assert "measured gap 50 % 50 %" in text
    assert "accuracy of 10 rounds 90.0 % 90.0 %" in text
    assert "difference +10.0 points +10.0 ± 2.0 points" in text
    assert "upload of 10 rounds 10 KiB 10 KiB" in text


def test_the_command_writes_and_prints(
    commands_config: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from fedfuse.cli import main

    (tmp_path / "c.yaml").write_text(yaml.safe_dump(commands_config), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["fedfuse", "diagnose", "c.yaml", "--rounds", "2", "--set", "model.width=2"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 0
    out = capsys.readouterr().out
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("diagnose-fusefl-digits-s1-")
    assert out.rstrip().endswith(f"report: {Path('runs') / folder.name / 'diagnosis.html'}")
    assert "mean cosine of updates" in out
    assert (folder / "diagnosis.html").is_file()


def test_a_run_s_folder_takes_no_options_of_configurations(commands_config: dict[str, Any], tmp_path: Path) -> None:
    local = commands_config["method"]["local"]
    fedfuse.run({**commands_config, "method": {"name": "one_round_probe", "local": local}}, out=tmp_path)
    options: dict[str, Any] = {"num_rounds": 3, "measure": False, "vary": [], "seeds": 1, "out": None}
    table, page = diagnose_and_tell(tmp_path, [], observer=Observer(), **options)
    assert page == tmp_path / "diagnosis.html"
    assert table["num_rounds"] == 3
    with pytest.raises(ConfigError) as caught:
        diagnose_and_tell(tmp_path, [], observer=Observer(), **{**options, "measure": True})
    assert str(caught.value) == (
        "these options are for configurations, and this is a run's folder\n"
        "  where: --set, --measure, --vary, --seeds, --out\n"
        "  fix:   leave them out, or name the configuration"
    )
