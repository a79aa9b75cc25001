"""The command: exit codes, messages, what it prints and writes."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fedfuse
import fedfuse.cli
from fedfuse.core import registry

# Of typer's import of click, where warnings are errors.
pytestmark = pytest.mark.filterwarnings("ignore:'click:DeprecationWarning")

CONFIG: dict[str, Any] = {
    "seed": 1,
    "data": {"source": "digits", "limit": 120, "test_limit": 60, "partition": {"scheme": "iid", "num_clients": 2}},
    "model": {"family": "mlp", "width": 8, "depth": 2},
    "method": {"name": "fusefl", "num_blocks": 2, "local": {"num_epochs": 2, "batch_size": 32}},
    "runtime": {"name": "local", "workers": 1},
    "server": {"threads": 1},
}


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a configuration, in which commands are run."""
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    # Tables are printed as wide as the terminal.
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


@pytest.fixture
def cli(here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """Runs the command in this process."""

    def run(*words: str | Path) -> Done:
        from fedfuse.cli import main

        monkeypatch.setattr(sys, "argv", ["fedfuse", *map(str, words)])
        try:
            main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Done(code, captured.out, captured.err)

    return run


def fedfuse_command(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "fedfuse.cli", *words], cwd=cwd, capture_output=True, text=True, check=False
    )


# --- help


def test_help_answers_in_half_a_second(here: Path) -> None:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        done = fedfuse_command("--help", cwd=here)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0
    # On a machine that is busy with other work every process waits for its turn.
    patience = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
    assert statistics.median(seconds) < 0.5 * patience, seconds


def test_help_imports_nothing_heavy(here: Path) -> None:
    code = (
        "import sys; sys.argv = ['fedfuse', 'run', '--help']\n"
        "from fedfuse.cli import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n"
        "    heavy = {'torch', 'numpy', 'matplotlib', 'sklearn', 'pydantic', 'yaml', 'datasets'}\n"
        "    print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=here)
    assert done.stdout.splitlines()[-1] == "[]"


def test_help_names_every_command(cli: Callable[..., Done]) -> None:
    done = cli("--help")
    assert done.code == 0
    for command in ("run", "compare", "advise", "list", "inspect", "report", "export", "doctor"):
        assert re.search(rf"^\s*{command} .*\w", done.out, flags=re.MULTILINE), command
        assert cli(command, "--help").code == 0


def test_no_words_print_the_help(cli: Callable[..., Done]) -> None:
    done = cli()
    assert "Commands" in done.out + done.err
    assert cli("--version") == Done(0, f"{fedfuse.__version__}\n", "")


@pytest.mark.parametrize(
    "words", [["rnu"], ["run"], ["run", "c.yaml", "--no-such"], ["compare", "c.yaml", "--seeds", "0"]]
)
def test_words_that_make_no_command(cli: Callable[..., Done], words: list[str]) -> None:
    done = cli(*words)
    assert done.code == 2
    assert done.err
    assert done.out == ""


# --- list


@pytest.mark.parametrize(
    "kind", ["methods", "partitions", "models", "sources", "runtimes", "rules", "attacks", "codecs"]
)
def test_list_prints_a_name_and_a_line_each(cli: Callable[..., Done], kind: str) -> None:
    done = cli("list", kind)
    assert done.code == 0
    entries: Any = getattr(registry, kind.upper())
    lines = done.out.splitlines()
    assert [line.split()[0] for line in lines] == entries.names()
    for line in lines:
        name, words = line.split(maxsplit=1)
        assert words == entries.summary(name)
        assert words.endswith((".", ":"))


def test_list_alone_prints_all_kinds(cli: Callable[..., Done]) -> None:
    done = cli("list")
    heads = [line for line in done.out.splitlines() if not line.startswith(" ")]
    assert heads == [
        "methods:",
        "partitions:",
        "models:",
        "sources:",
        "runtimes:",
        "rules:",
        "adapter-rules:",
        "attacks:",
        "codecs:",
    ]


def test_a_kind_that_there_is_not(cli: Callable[..., Done]) -> None:
    assert cli("list", "method") == Done(
        2,
        "",
        'error: there is no list of "method"\n'
        "  where: fedfuse list\n"
        '  fix:   did you mean "methods"? known: adapter-rules, attacks, codecs, methods, models, '
        "partitions, rules, runtimes, sources\n",
    )


# --- run


def test_a_dry_run_prints_every_default_and_runs_nothing(cli: Callable[..., Done], here: Path) -> None:
    done = cli("run", "c.yaml", "--dry-run", "--set", "method.num_blocks=1", "--set", "seed=5")
    assert (done.code, done.err) == (0, "")
    table = yaml.safe_load(done.out)
    assert (table["seed"], table["method"]["num_blocks"]) == (5, 1)
    assert table["method"]["adaptor"] == "conv1x1"
    assert {key: table["federation"][key] for key in ("quorum", "timeout_s", "max_upload_bytes")} == {
        "quorum": 1.0,
        "timeout_s": None,
        "max_upload_bytes": 4 << 30,
    }
    (here / "whole.yaml").write_text(done.out, encoding="utf-8")
    assert cli("run", "whole.yaml", "--dry-run").out == done.out
    assert sorted(path.name for path in here.iterdir()) == ["c.yaml", "whole.yaml"]


def test_a_run_writes_its_folder_with_a_report(cli: Callable[..., Done], here: Path) -> None:
    done = cli("run", "c.yaml", "--out", "out/run")
    assert done.code == 0
    facts = json.loads((here / "out" / "run" / "result.json").read_text())
    assert 0 <= facts["accuracy"] <= 1
    assert done.out.rstrip().endswith(f"report: {Path('out/run/report.html')}")
    page = (here / "out" / "run" / "report.html").read_text(encoding="utf-8")
    assert "<html" in page
    # Nothing is fetched when it is opened.
    assert not re.search(r"""(src|href)=["']https?://""", page)
    assert "fusefl" in done.out


@pytest.fixture
def without_reports(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures take seconds, which tests of something else do not need."""
    monkeypatch.setattr("fedfuse.report.write_report", lambda folder: folder / "report.html")


@pytest.mark.usefixtures("without_reports")
def test_without_out_the_same_configuration_finds_its_folder_again(cli: Callable[..., Done], here: Path) -> None:
    assert cli("run", "c.yaml").code == 0
    (folder,) = (here / "runs").iterdir()
    assert re.fullmatch(r"fusefl-digits-s1-[0-9a-f]{8}", folder.name)
    assert cli("run", "c.yaml").code == 0
    assert list((here / "runs").iterdir()) == [folder]
    assert all(e["from_journal"] for e in json.loads((folder / "ledger.json").read_text())["entries"])


@pytest.mark.usefixtures("without_reports")
def test_a_run_s_configuration_repeats_it(cli: Callable[..., Done], here: Path) -> None:
    cli("run", "c.yaml", "--out", "a")
    assert cli("run", "a/config.yaml", "--out", "b").code == 0
    first, second = (json.loads((here / name / "result.json").read_text()) for name in "ab")
    assert first["artifact"] == second["artifact"]


@pytest.mark.parametrize(
    ("words", "err"),
    [
        (
            ["run", "nothing.yaml"],
            (
                "error: cannot read the configuration: No such file or directory\n"
                "  where: nothing.yaml\n  fix:   name a YAML file\n"
            ),
        ),
        (
            ["run", "c.yaml", "--set", "method.num_bloks=2"],
            'error: unknown setting "num_bloks"\n  where: method.num_bloks\n  fix:   did you mean "num_blocks"? ',
        ),
        (
            ["run", "c.yaml", "--dry-run", "--set", "data.limt=2"],
            'error: unknown setting "limt"\n  where: data.limt\n  fix:   did you mean "limit"? known: ',
        ),
        (["run", "c.yaml", "--set", "num_blocks"], 'error: "num_blocks" is no setting\n  where: --set\n'),
        (["compare", "c.yaml"], "error: there is nothing to compare\n  where: methods\n"),
        (
            ["compare", "c.yaml", "--methods", "local,fedvg"],
            'error: there is no method "fedvg"\n  fix:   did you mean "fedavg"?',
        ),
        (["inspect", "nothing"], "error: there is nothing here that fedfuse knows\n  where: nothing\n"),
        (["export", "nothing", "--format", "onnx"], "error: this is no artifact: "),
        (["report", "nothing"], "error: "),
    ],
)
def test_a_foreseen_mistake_ends_in_its_message_and_code_2(
    cli: Callable[..., Done], here: Path, words: list[str], err: str
) -> None:
    done = cli(*words)
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith(err)
    assert not (here / "runs").exists()
    assert not (here / "nothing").exists()


def test_the_same_from_outside(here: Path) -> None:
    done = fedfuse_command("run", "c.yaml", "--set", "method.num_bloks=2", cwd=here)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith('error: unknown setting "num_bloks"\n  where: method.num_bloks\n')
    assert "Traceback" not in done.stderr


def test_ctrl_c_says_how_to_go_on(cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*facts: Any, **settings: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("fedfuse.experiment.run", interrupted)
    done = cli("run", "c.yaml")
    assert done.code == 130
    assert "interrupted; the same command continues" in done.err


# --- compare


def test_a_comparison_writes_its_board_and_report(cli: Callable[..., Done], here: Path) -> None:
    done = cli("compare", "c.yaml", "--methods", "local,fusefl[num_blocks=1],ensemble", "--seeds", "2", "--out", "out")
    assert done.code == 0
    board = json.loads((here / "out" / "board.json").read_text())
    assert [row["method"] for row in board["rows"]] == ["local", "fusefl[num_blocks=1]", "ensemble"]
    assert [row["num_seeds"] for row in board["rows"]] == [2, 2, 2]
    assert all(row["method"] in done.out for row in board["rows"])
    assert done.out.rstrip().endswith(f"report: {Path('out/report.html')}")
    assert (here / "out" / "report.html").is_file()
    assert list((here / "out" / "figures").glob("*.png"))
    assert list((here / "out" / "figures").glob("*.svg"))


def test_settings_are_varied_and_the_advice_is_read_from_what_was_measured(
    cli: Callable[..., Done], here: Path
) -> None:
    asked = cli("advise", "c.yaml")
    assert asked.code == 2
    assert "error: this configuration was not compared yet\n" in asked.err
    assert "  fix:   run: fedfuse compare c.yaml --methods local,fedavg,ensemble,fusefl" in asked.err
    vary = ["--vary", "data.partition.num_clients=2,3"]
    done = cli("compare", "c.yaml", "--methods", "local,fedavg,ensemble", *vary)
    assert done.code == 0
    assert [line for line in done.out.splitlines() if line.startswith("num_clients")] == [
        "num_clients 2",
        "num_clients 3",
    ]
    advised = cli("advise", "c.yaml", "--heterogeneous", "--server-data", "no")
    assert advised.code == 0
    lines = advised.out.splitlines()
    assert lines[0] == "constraints: clients with different models, no data at the server"
    assert lines[1].startswith("from runs/compare-fusefl-digits-s1-")
    for line, count in zip(lines[2:4], (2, 3), strict=True):
        assert line.startswith(f"num_clients {count}: Choose Ensemble: ")
        assert "FedAvg (needs one architecture)" in line
    assert (
        lines[4] == "The advice is read from measured test accuracy on this data; it predicts nothing for other data."
    )
    assert cli("advise", "c.yaml", "--server-data", "maybe").err == (
        'error: "maybe" is neither yes nor no\n  where: --server-data\n  fix:   say yes or no\n'
    )


# --- inspect, report, export, doctor


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder without a report."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    fedfuse.run(CONFIG, out=folder)
    return folder


@pytest.fixture
def run_folder(finished: Path, here: Path) -> Path:
    """A run's folder of the test's own."""
    shutil.copytree(finished, here / "run")
    return Path("run")


def test_inspect_prints_what_a_path_holds(cli: Callable[..., Done], run_folder: Path) -> None:
    assert cli("inspect", run_folder).out.startswith("run run\n  method      fusefl, seed 1\n")
    assert cli("inspect", run_folder / "artifact").out.startswith("artifact run/artifact\n")
    assert cli("inspect", run_folder / "journal").out.startswith("journal run/journal: 6 replies\n")
    upload = min((run_folder / "journal").glob("*.safetensors"))
    assert cli("inspect", upload).out.startswith(f"payload {upload}: ")


def test_a_report_is_written_anew(cli: Callable[..., Done], run_folder: Path) -> None:
    assert not (run_folder / "report.html").exists()
    assert cli("report", run_folder) == Done(0, "report: run/report.html\n", "")
    assert "fusefl" in (run_folder / "report.html").read_text(encoding="utf-8")


def test_export_prints_the_file_that_it_wrote(cli: Callable[..., Done], run_folder: Path) -> None:
    done = cli("export", run_folder, "--format", "safetensors", "--out", "w.safetensors")
    assert (done.code, done.out) == (0, "wrote w.safetensors\n")
    assert Path("w.safetensors").is_file()
    assert cli("export", run_folder, "--format", "onx") == Done(
        2,
        "",
        'error: there is no format "onx"\n  where: --format\n'
        '  fix:   did you mean "onnx"? known: diffusers, onnx, peft, safetensors, torch-export, transformers\n',
    )


@pytest.mark.parametrize(("is_fine", "code"), [(True, 0), (False, 1)])
def test_doctor_prints_its_findings_and_tells_by_its_code(
    cli: Callable[..., Done], monkeypatch: pytest.MonkeyPatch, is_fine: bool, code: int
) -> None:
    from fedfuse.commands import doctor

    findings = [doctor.Finding("torch", torch.__version__), doctor.Finding("disk", "little", is_fine)]
    monkeypatch.setattr(doctor, "examine", lambda: iter(findings))
    done = cli("doctor")
    assert done.code == code
    assert done.out == f"ok   torch: {torch.__version__}\n{'ok  ' if is_fine else 'BAD '} disk: little\n"


@pytest.mark.slow
def test_doctor_finds_this_installation_sound(here: Path) -> None:
    done = fedfuse_command("doctor", cwd=here)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "BAD" not in done.stdout
    assert "ok   small run: twice the same model, digest " in done.stdout


def test_a_federation_by_hand_from_split_to_report(cli: Callable[..., Done], here: Path) -> None:
    done = cli("split", "c.yaml", "--out", "trial", "--set", "method={name: fedavg}")
    assert (done.code, done.out.count("wrote trial/")) == (0, 4)
    answer = ["contribute", "trial/federation.yaml", "--name", "client_0", "--data", "trial/client_0.npz"]
    done = cli(*answer, "--home", "homes/0", "--out", "inbox/0.fed")
    assert done.code == 0
    assert 'what leaves client_0 for "local_models" of fedavg: ' in done.out
    assert re.search(r"wrote inbox/0\.fed: [\d.]+ KiB\nclient_0 signs with the key [0-9a-f]{64}\n", done.out)
    fuse = ["fuse", "inbox", "--config", "trial/federation.yaml", "--out", "run"]
    done = cli(*fuse)
    assert done.code == 3
    assert "missing: client_1: nothing came from it\nwaiting for client_1: fedfuse contribute" in done.out
    answer = ["contribute", "trial/federation.yaml", "--name", "client_1", "--data", "trial/client_1.npz"]
    assert cli(*answer, "--home", "homes/1", "--out", "inbox/1.fed").code == 0
    shutil.copy(here / "inbox" / "1.fed", here / "inbox" / "cut.fed")
    os.truncate(here / "inbox" / "cut.fed", 100)
    done = cli(*fuse)
    assert done.code == 0
    assert "not used: inbox/cut.fed: the sealed message was refused: " in done.out
    assert "report: run/report.html" in done.out
    simulated = fedfuse.run({**CONFIG, "method": {"name": "fedavg"}})
    assert json.loads((here / "run" / "result.json").read_text())["artifact"] == simulated.facts["artifact"]
    other = cli(*fuse[:-1], "other", "--method", "ensemble[combine=vote]")
    assert other.code == 0
    assert "ensemble" in other.out


def test_a_preview_needs_somebody_to_ask(cli: Callable[..., Done], here: Path) -> None:
    done = cli("contribute", "c.yaml", "--name", "client_0", "--out", "x.fed", "--preview", "--home", "home")
    assert (done.code, done.err) == (
        2,
        (
            "error: there is no terminal to ask at\n"
            "  where: --preview\n"
            "  fix:   leave it out and name what must stay by --refuse\n"
        ),
    )
    done = cli("contribute", "c.yaml", "--name", "client_0", "--out", "x.fed", "--refuse", "block/*", "--home", "home")
    assert done.code == 2
    assert done.err.startswith('error: nothing was written: the upload holds "block/')
    assert not (here / "x.fed").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_wherever_it_was_met(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(**_: object) -> int:
        raise OSError(number, os.strerror(number), "figures/curves.png")

    monkeypatch.setattr(fedfuse.cli, "app", full)
    with pytest.raises(SystemExit) as caught:
        fedfuse.cli.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == (
        f"error: cannot write: {os.strerror(number)}\n"
        "  where: figures/curves.png\n"
        "  fix:   free disk space or name another folder, then run the same command again\n"
    )


def test_another_fault_of_the_system_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def fault(**_: object) -> int:
        raise FileNotFoundError(errno.ENOENT, "gone")

    monkeypatch.setattr(fedfuse.cli, "app", fault)
    with pytest.raises(FileNotFoundError):
        fedfuse.cli.main()
