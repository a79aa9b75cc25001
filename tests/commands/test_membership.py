"""Clients that leave a finished run, and clients that come late."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

import fedfuse
from fedfuse.commands import membership
from fedfuse.commands.membership import add_client, remove_client
from fedfuse.core.errors import ConfigError, JournalError, QuorumError
from fedfuse.core.journal import Journal
from fedfuse.experiment import read_config
from fedfuse.experiment.setting import Loader

CONFIG: dict[str, Any] = {
    "seed": 3,
    "data": {
        "source": "digits",
        "limit": 300,
        "test_limit": 100,
        "partition": {"scheme": "dirichlet", "num_clients": 3, "dirichlet_alpha": 0.5},
    },
    "model": {"family": "mlp", "width": 8, "depth": 2},
    "method": {"name": "afl", "backbone": {"num_features": 64}},
    "runtime": {"name": "local", "workers": 1},
    "server": {"threads": 1},
}
METHODS: list[dict[str, Any]] = [
    {"name": "afl", "backbone": {"num_features": 64}},
    {"name": "lda", "backbone": {"num_features": 64}},
    {"name": "prototypes", "kind": "naive_bayes"},
    {"name": "fedpft", "backbone": {"num_features": 32}, "head_training": {"num_epochs": 2}},
]


def digest_of(folder: Path) -> str:
    return str(json.loads((folder / "result.json").read_text())["artifact"]["digest"])


def clients_in(folder: Path) -> set[str]:
    return {json.loads(path.read_text())["client"] for path in (folder / "journal").glob("*.json")}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("membership") / "run"
    fedfuse.run(CONFIG, out=folder)
    return folder


@pytest.fixture
def folder(finished: Path, tmp_path: Path) -> Path:
    """A copy of a finished run of afl."""
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """What client_1 holds, as it came from the source."""
    loader = Loader(read_config(CONFIG))
    rows = loader.setting(3).data.positions["client_1"]
    own = loader.dataset().train.subset(rows)
    np.savez(tmp_path / "own.npz", x=own.x.numpy(), y=own.y.numpy())
    return tmp_path / "own.npz"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method["name"])
def test_to_leave_is_never_to_have_been_there_and_to_come_back_restores_every_bit(
    method: dict[str, Any], tmp_path: Path, file: Path
) -> None:
    run = tmp_path / "run"
    config = {**CONFIG, "method": method}
    before = fedfuse.run(config, out=run).facts["artifact"]["digest"]
    remove_client(run, "client_1")
    never = fedfuse.run({**config, "data": {**CONFIG["data"], "without": ["client_1"]}}, out=tmp_path / "never")
    assert digest_of(run) == never.facts["artifact"]["digest"] != before
    assert clients_in(run) == {"client_0", "client_2"}
    facts = add_client(run, "client_1", file)
    assert digest_of(run) == facts["artifact"]["digest"] == before
    assert clients_in(run) == {"client_0", "client_1", "client_2"}


def test_nobody_else_computes(folder: Path, file: Path) -> None:
    remove_client(folder, "client_1")
    entries = json.loads((folder / "ledger.json").read_text())["entries"]
    assert [(e["client"], e["from_journal"]) for e in entries] == [("client_0", True), ("client_2", True)]
    add_client(folder, "client_1", file)
    entries = json.loads((folder / "ledger.json").read_text())["entries"]
    assert {e["client"]: e["from_journal"] for e in entries} == {
        "client_0": True,
        "client_1": False,
        "client_2": True,
    }


def test_everything_of_the_run_is_written_again(folder: Path) -> None:
    remove_client(folder, "client_1")
    assert "client_1" not in json.loads((folder / "result.json").read_text())["clients"]
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["data"]["without"] == ["client_1"]
    assert written["runtime"]["name"] == "local"
    assert written["federation"]["quorum"] == 1.0
    assert fedfuse.load(folder) is not None
    again = fedfuse.run(folder / "config.yaml", out=folder)
    assert again.facts["artifact"]["digest"] == digest_of(folder)
    assert not (folder / ".changed").exists()
    assert all("client_1" not in (folder / name).read_text() for name in ("ledger.json", "metrics.jsonl"))


def test_a_removed_client_comes_back_without_a_file(folder: Path, finished: Path) -> None:
    remove_client(folder, "client_1")
    add_client(folder, "client_1")
    assert digest_of(folder) == digest_of(finished)
    assert (folder / "config.yaml").read_text() == (finished / "config.yaml").read_text()


def test_a_new_client_comes_and_leaves(folder: Path, finished: Path, file: Path) -> None:
    add_client(folder, "hospital", file)
    assert digest_of(folder) != digest_of(finished)
    written = yaml.safe_load((folder / "config.yaml").read_text())
    assert written["data"]["late"] == {"hospital": {"source": "npz", "path": str(file)}}
    assert fedfuse.run(folder / "config.yaml", out=folder).facts["artifact"]["digest"] == digest_of(folder)
    remove_client(folder, "hospital")
    assert digest_of(folder) == digest_of(finished)
    assert (folder / "config.yaml").read_text() == (finished / "config.yaml").read_text()


def test_settings_of_the_source_and_other_files(folder: Path, file: Path, tmp_path: Path) -> None:
    arrays = np.load(file)
    np.savez(tmp_path / "other.data", images=arrays["x"], labels=arrays["y"])
    os.rename(tmp_path / "other.data.npz", tmp_path / "other.data")
    with pytest.raises(ConfigError) as caught:
        add_client(folder, "late", tmp_path / "other.data")
    assert str(caught.value) == (
        f"the file's name does not tell how to read it\n  where: {tmp_path / 'other.data'}\n"
        "  fix:   end it in .npz, .csv, .parquet, or give --source"
    )
    settings = ["x_key=images", "y_key=labels"]
    add_client(folder, "late", tmp_path / "other.data", source="npz", settings=settings)
    assert clients_in(folder) == {"client_0", "client_1", "client_2", "late"}


@pytest.mark.parametrize("step", range(1, 7))
def test_a_removal_that_is_interrupted_anywhere_is_finished_by_the_same_command(
    folder: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    wanted = Path(shutil.copytree(folder, folder.parent / "wanted"))
    remove_client(wanted, "client_1")
    moved, before = [], digest_of(folder)
    original = os.replace

    def replace(source: Any, target: Any) -> None:
        if ".changed" in str(source) and ".part" not in str(source):
            moved.append(target)
            if len(moved) == step:
                raise Killed
        original(source, target)

    # The sixth step is past all moves: there the journal is about to be cleaned.
    monkeypatch.setattr(membership.os, "replace", replace)
    if step == 6:
        monkeypatch.setattr(membership, "_forget", lambda *facts: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        remove_client(folder, "client_1")
    monkeypatch.undo()
    assert clients_in(folder) == {"client_0", "client_1", "client_2"}
    assert digest_of(folder) in (before, digest_of(wanted))
    remove_client(folder, "client_1")
    for name in ("config.yaml", "artifact/fused.json", "artifact/model.safetensors"):
        assert (folder / name).read_bytes() == (wanted / name).read_bytes()
    assert clients_in(folder) == {"client_0", "client_2"}


def test_a_client_that_cannot_answer_leaves_the_run_as_it_was(
    folder: Path, finished: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedfuse.runtimes import local

    def broken(request: Any, side: Any, progress: Any) -> Any:
        return local.Reply(side.id, error="the disk is gone")

    monkeypatch.setattr(local, "perform", broken)
    with pytest.raises(QuorumError, match="hospital did not answer: gram: the disk is gone"):
        add_client(folder, "hospital", file)
    assert (folder / "config.yaml").read_text() == (finished / "config.yaml").read_text()
    assert digest_of(folder) == digest_of(finished)


def test_an_upload_that_was_lost_is_told_and_nothing_is_changed(folder: Path, finished: Path) -> None:
    with Journal(folder / "journal") as journal:
        lost = next(entry for entry in journal.entries() if entry.facts["client"] == "client_2")
        assert lost.path is not None
        lost.path.unlink()
    with pytest.raises(JournalError) as caught:
        remove_client(folder, "client_1")
    assert str(caught.value) == (
        'the journal no longer holds what client_2 sent in "gram"\n'
        f"  where: {folder / 'journal'}\n"
        f"  fix:   ask it again first: fedfuse run {folder / 'config.yaml'} --out {folder}"
    )
    assert digest_of(folder) == digest_of(finished)
    assert "client_1" in clients_in(folder)


def test_who_was_missing_stays_missing(tmp_path: Path) -> None:
    faulty = {**CONFIG, "federation": {"quorum": 0.6, "timeout_s": None}}
    run = tmp_path / "run"
    fedfuse.run(faulty, out=run)
    facts = json.loads((run / "result.json").read_text())
    facts["uploads"]["gram"].pop("client_2")
    (run / "result.json").write_text(json.dumps(facts))
    for path in (run / "journal").glob("*.json"):
        if json.loads(path.read_text())["client"] == "client_2":
            path.unlink()
    removed = remove_client(run, "client_1")
    assert list(removed["missing"]) == ["client_2"]
    assert list(removed["uploads"]["gram"]) == ["client_0"]


def test_methods_whose_uploads_depend_on_each_other_are_refused(tmp_path: Path) -> None:
    method = {"name": "fedavg", "num_rounds": 2, "local": {"num_epochs": 2}}
    fedfuse.run({**CONFIG, "method": method}, out=tmp_path / "run")
    for command in (remove_client, add_client):
        with pytest.raises(ConfigError) as caught:
            command(tmp_path / "run", "client_1")
        assert str(caught.value) == (
            "in this run of fedavg, what clients sent depends on the other clients\n"
            f"  where: {tmp_path / 'run'}\n"
            "  fix:   run it again without that client, or use a method that asks its clients once"
        )


@pytest.mark.parametrize("name", ["fedavg", "ensemble"])
def test_a_method_that_asks_once_lets_clients_come_and_go(name: str, tmp_path: Path) -> None:
    config = {**CONFIG, "method": {"name": name, "local": {"num_epochs": 1}}}
    whole = fedfuse.run(config, out=tmp_path / "run")
    without = fedfuse.run({**config, "data": {**CONFIG["data"], "without": ["client_1"]}})
    assert remove_client(tmp_path / "run", "client_1")["artifact"] == without.facts["artifact"]
    assert add_client(tmp_path / "run", "client_1")["artifact"] == whole.facts["artifact"]


def test_mistakes_are_told_apart(folder: Path, tmp_path: Path, file: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        remove_client(folder, "client_7")
    assert str(caught.value) == (
        f'there is no client "client_7"\n  where: {folder}\n'
        '  fix:   did you mean "client_2"? known: client_0, client_1, client_2'
    )
    with pytest.raises(ConfigError, match='there is a client "client_1" already'):
        add_client(folder, "client_1", file)
    with pytest.raises(ConfigError) as caught:
        add_client(folder, "hospital")
    assert str(caught.value) == (
        f'nothing says where the data of "hospital" are\n  where: {folder}\n  fix:   give --data FILE'
    )
    with pytest.raises(ConfigError) as caught:
        remove_client(tmp_path, "client_1")
    assert str(caught.value) == (
        f"this is no finished run with a journal of its own\n  where: {tmp_path}\n"
        "  fix:   name the folder of a fedfuse run; the runs of a comparison share one journal"
    )
    remove_client(folder, "client_0")
    remove_client(folder, "client_1")
    with pytest.raises(ConfigError, match='"client_2" is the only client'):
        remove_client(folder, "client_2")
    with pytest.raises(ConfigError, match='there is no client "client_1"'):
        remove_client(folder, "client_1")


@pytest.mark.filterwarnings("ignore:'click:DeprecationWarning")
def test_the_commands(folder: Path, file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    import sys

    from fedfuse.cli import main

    for words in (["remove", str(folder), "--client", "client_1"], ["add", str(folder), "--client", "client_1"]):
        monkeypatch.setattr(sys, "argv", ["fedfuse", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        assert not ended.value.code
        assert f"report: {folder / 'report.html'}" in capsys.readouterr().out
    assert clients_in(folder) == {"client_0", "client_1", "client_2"}
