"""Several methods on the same data and models: what is shared, what is written, what is refused."""

from __future__ import annotations

import json
import shutil
import statistics
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

import fedfuse
from fedfuse.core.errors import ConfigError, FedfuseError
from fedfuse.core.journal import Journal
from fedfuse.experiment import Observer, split_outside_brackets
from fedfuse.methods.fusefl import FuseFL
from fedfuse.training import LocalSGD

SHARING = ["local", "fedavg", "ensemble", "feature_ensemble"]


def entries(home: Path) -> Counter[tuple[str, str]]:
    with Journal(home / "journal") as journal:
        return Counter((entry.facts["exchange"], entry.facts["client"]) for entry in journal.entries())


def ledger(home: Path, run: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((home / run / "ledger.json").read_text())["entries"]
    return found


def test_methods_that_share_local_training_train_each_client_once(config: dict[str, Any], tmp_path: Path) -> None:
    board = fedfuse.compare(config, SHARING, out=tmp_path)
    assert [row["method"] for row in board["rows"]] == SHARING
    counts = entries(tmp_path)
    assert [counts["local_models", f"client_{i}"] for i in range(3)] == [1, 1, 1]
    assert sum(n for (exchange, _), n in counts.items() if exchange == "local_models") == 3
    flags = {
        method: [e["from_journal"] for e in ledger(tmp_path, f"{method}/seed_2") if e["exchange"] == "local_models"]
        for method in SHARING
    }
    assert flags == {"local": [False] * 3, "fedavg": [True] * 3, "ensemble": [True] * 3, "feature_ensemble": [True] * 3}
    # An answer from the journal counts as if it had been given now: the board compares methods, not cache hits.
    assert len({row["upload_bytes"] for row in board["rows"][:3]}) == 1
    assert len({row["client_seconds"] for row in board["rows"][:3]}) == 1


def test_the_board_is_as_it_was_agreed(config: dict[str, Any], tmp_path: Path) -> None:
    board = fedfuse.compare(config, ["fedavg", "fusefl"], seeds=2, out=tmp_path)
    assert json.loads((tmp_path / "board.json").read_text()) == board
    assert sorted(board) == ["config", "rows", "seeds", "versions"]
    assert board["seeds"] == [2, 3]
    for row in board["rows"]:
        assert {
            "method", "accuracy_mean", "accuracy_std", "upload_bytes", "download_bytes", "exchanges", "storage_bytes",
            "client_seconds", "server_seconds", "peak_rss_bytes",
        } <= set(row)  # fmt: skip
        runs = [json.loads((tmp_path / run / "result.json").read_text()) for run in row["runs"]]
        assert row["runs"] == [f"{row['method']}/seed_{seed}" for seed in (2, 3)]
        assert [run["seed"] for run in runs] == [2, 3]
        accuracies = [run["accuracy"] for run in runs]
        assert row["accuracies"] == accuracies
        assert row["accuracy_mean"] == pytest.approx(statistics.fmean(accuracies))
        assert row["accuracy_std"] == pytest.approx(statistics.stdev(accuracies))
        assert row["num_seeds"] == 2
        for name in ("upload_bytes", "download_bytes", "exchanges", "storage_bytes", "peak_rss_bytes"):
            assert row[name] == pytest.approx(statistics.fmean(run["ledger"][name] for run in runs))
    assert [row["exchanges"] for row in board["rows"]] == [1, 3]


def test_one_seed_has_no_spread(config: dict[str, Any]) -> None:
    (row,) = fedfuse.compare(config, ["local"])["rows"]
    assert row["accuracy_std"] == 0.0


def test_seeds_may_be_listed(config: dict[str, Any]) -> None:
    board = fedfuse.compare(config, "local", seeds=[5, 11])
    assert board["seeds"] == [5, 11]
    assert board["rows"][0]["runs"] == ["local/seed_5", "local/seed_11"]


class Heard(Observer):
    def __init__(self) -> None:
        self.started: list[tuple[str, int, int, int]] = []
        self.ended: list[str] = []
        self.found: list[tuple[str, int]] = []

    def run_found(self, label: str, seed: int, facts: Any) -> None:
        self.found.append((label, seed))

    def run_started(self, label: str, seed: int, position: int, total: int) -> None:
        self.started.append((label, seed, position, total))

    def run_ended(self, result: Any) -> None:
        self.ended.append(result.method)


def test_the_same_command_continues_after_a_run_s_folder_is_gone(config: dict[str, Any], tmp_path: Path) -> None:
    methods = ["fedavg", "ensemble"]
    first = fedfuse.compare(config, methods, seeds=2, out=tmp_path)
    before = json.loads((tmp_path / "ensemble" / "seed_3" / "result.json").read_text())
    shutil.rmtree(tmp_path / "ensemble" / "seed_3")
    heard = Heard()
    again = fedfuse.compare(config, methods, seeds=2, out=tmp_path, observer=heard)
    assert heard.started == [("fedavg", 2, 1, 4), ("ensemble", 2, 2, 4), ("fedavg", 3, 3, 4), ("ensemble", 3, 4, 4)]
    assert heard.ended == ["ensemble"]
    after = json.loads((tmp_path / "ensemble" / "seed_3" / "result.json").read_text())
    assert after["artifact"] == before["artifact"]
    assert all(e["from_journal"] for e in ledger(tmp_path, "ensemble/seed_3"))
    for old, new in zip(first["rows"], again["rows"], strict=True):
        assert old["accuracies"] == new["accuracies"]
        assert old["upload_bytes"] == new["upload_bytes"]


def test_another_setting_runs_anew_in_the_same_folder(config: dict[str, Any], tmp_path: Path) -> None:
    fedfuse.compare(config, ["fedavg"], out=tmp_path)
    heard = Heard()
    fedfuse.compare(config, ["fedavg"], overrides=["data.limit=150"], out=tmp_path, observer=heard)
    assert heard.ended == ["fedavg"]


def test_settings_in_brackets_tables_and_objects(config: dict[str, Any], tmp_path: Path) -> None:
    own = FuseFL(num_blocks=1, local=LocalSGD(num_epochs=1, batch_size=32))
    methods = [
        "fusefl[num_blocks=1, head.kind=average]",
        {"name": "fusefl", "label": "with dropout", "feature_dropout": 0.5},
        own,
        "ensemble[combine=vote]",
    ]
    board = fedfuse.compare(config, methods, out=tmp_path)
    labels = ["fusefl[num_blocks=1, head.kind=average]", "with dropout", "fusefl", "ensemble[combine=vote]"]
    assert [row["method"] for row in board["rows"]] == labels
    used = [
        json.loads((tmp_path / r["runs"][0] / "result.json").read_text())["config"]["method"] for r in board["rows"]
    ]
    assert (used[0]["num_blocks"], used[0]["head"]["kind"]) == (1, "average")
    # What is not said comes from the configuration's own section of that method.
    assert (used[1]["num_blocks"], used[1]["feature_dropout"]) == (2, 0.5)
    assert (used[2]["num_blocks"], used[2]["local"]["num_epochs"]) == (1, 1)
    # Equal local work is the ground on which all are compared.
    assert used[3]["local"]["num_epochs"] == 2
    assert [row["exchanges"] for row in board["rows"]] == [1, 3, 2, 1]


def test_the_configuration_may_list_the_methods(config: dict[str, Any]) -> None:
    config["methods"] = ["local", {"name": "fedavg", "label": "mean"}]
    assert [row["method"] for row in fedfuse.compare(config)["rows"]] == ["local", "mean"]
    assert [row["method"] for row in fedfuse.compare(config, "fedavg")["rows"]] == ["fedavg"]


def test_a_comparison_in_memory_leaves_nothing_behind(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    fedfuse.compare(config, ["local"])
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


# --- several settings


ALPHA, CLIENTS = "data.partition.dirichlet_alpha", "data.partition.num_clients"


def test_every_pair_of_values_is_a_comparison_of_its_own(config: dict[str, Any], tmp_path: Path) -> None:
    heard = Heard()
    vary = {ALPHA: [0.3, 0.9], CLIENTS: [2, 3]}
    board = fedfuse.compare(config, ["local", "fedavg"], vary=vary, out=tmp_path, observer=heard)
    assert json.loads((tmp_path / "board.json").read_text()) == board
    assert board["varied"] == vary
    assert [position for *_, position, total in heard.started] == list(range(1, 9))
    assert {total for *_, total in heard.started} == {8}
    folders = [f"dirichlet_alpha={a}_num_clients={m}" for a in (0.3, 0.9) for m in (2, 3)]
    assert board["boards"] == folders
    assert [row["varied"] for row in board["rows"][::2]] == [{ALPHA: a, CLIENTS: m} for a in (0.3, 0.9) for m in (2, 3)]
    for row, folder in zip(board["rows"], [name for name in folders for _ in range(2)], strict=True):
        assert row["runs"] == [f"{folder}/{row['method']}/seed_2"]
        partition = json.loads((tmp_path / row["runs"][0] / "result.json").read_text())["config"]["data"]["partition"]
        assert {key.rpartition(".")[2]: partition[key.rpartition(".")[2]] for key in vary} == {
            key.rpartition(".")[2]: value for key, value in row["varied"].items()
        }
        # Clients train once per setting.
        assert all(e["from_journal"] == (row["method"] == "fedavg") for e in ledger(tmp_path, row["runs"][0]))
    one = fedfuse.compare(config, ["local", "fedavg"], overrides=[f"{ALPHA}=0.9", f"{CLIENTS}=2"])
    assert [row["accuracies"] for row in one["rows"]] == [row["accuracies"] for row in board["rows"][4:6]]


def test_varied_settings_continue_after_a_kill(config: dict[str, Any], tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    class Killer(Heard):
        def run_started(self, label: str, seed: int, position: int, total: int) -> None:
            super().run_started(label, seed, position, total)
            if position == 4:
                raise Killed

    vary = [f"{ALPHA}=0.3,0.9"]
    with pytest.raises(Killed):
        fedfuse.compare(config, ["local", "fedavg"], vary=vary, out=tmp_path, observer=Killer())
    partial = json.loads((tmp_path / "board.json").read_text())
    assert [row["method"] for row in partial["rows"]] == ["local", "fedavg"]
    assert partial["boards"] == ["dirichlet_alpha=0.3"]
    heard = Heard()
    board = fedfuse.compare(config, ["local", "fedavg"], vary=vary, out=tmp_path, observer=heard)
    assert heard.ended == ["fedavg"]
    assert heard.found == [("local", 2), ("fedavg", 2), ("local", 2)]
    assert len(board["rows"]) == 4


def test_rows_say_what_a_method_needs(config: dict[str, Any]) -> None:
    rows = fedfuse.compare(config, ["fedavg", {"name": "ensemble", "label": "all"}])["rows"]
    assert [(row["name"], row["needs_server_data"], row["takes_heterogeneous"]) for row in rows] == [
        ("fedavg", False, False),
        ("ensemble", False, True),
    ]


@pytest.mark.parametrize(
    ("vary", "message"),
    [
        ({"seed": [1]}, "the seed is varied\n  where: vary\n  fix:   say how many seeds with --seeds"),
        ({ALPHA: []}, f'"{ALPHA}" has no values\n  where: vary\n  fix:   write {ALPHA}=value,value'),
        ([f"{ALPHA}=0.1,0.1"], f'"{ALPHA}" has the value 0.1 twice\n  where: vary\n  fix:   give each value once'),
        (
            [f"{ALPHA}=1", f"{ALPHA}=2"],
            f'"{ALPHA}" is varied twice\n  where: vary\n  fix:   give all its values at once',
        ),
        (["alpha"], '"alpha" varies nothing\n  where: vary\n  fix:   write section.key=value,value'),
        (
            [f"{ALPHA}=0.1,-1"],
            (
                "dirichlet_alpha must be above 0, not -1.0\n  where: partition.dirichlet_alpha\n"
                "  fix:   set dirichlet_alpha to a positive number"
            ),
        ),
    ],
)
def test_values_that_cannot_be_varied_are_told_before_the_first_runs(
    config: dict[str, Any], vary: Any, message: str
) -> None:
    assert refused(config, ["local"], vary=vary) == message


def test_settings_with_one_last_word_have_folders_of_their_own(config: dict[str, Any]) -> None:
    vary = {"method.local.num_epochs": [1, 2], "data.limit": [100]}
    board = fedfuse.compare(config, ["local"], vary=vary)
    assert board["boards"] == ["num_epochs=1_limit=100", "num_epochs=2_limit=100"]
    assert board["rows"][0]["varied"] == {"method.local.num_epochs": 1, "data.limit": 100}


# --- refusals: all before the first client trains


def refused(config: dict[str, Any], methods: Any, **settings: Any) -> str:
    class Silent(Observer):
        def run_started(self, *facts: Any) -> None:
            raise AssertionError("a run was started")

    with pytest.raises(FedfuseError) as caught:
        fedfuse.compare(config, methods, observer=Silent(), **settings)
    return str(caught.value)


def test_nothing_to_compare(config: dict[str, Any]) -> None:
    assert refused(config, []) == (
        "there is nothing to compare\n"
        "  where: methods\n"
        "  fix:   give --methods a,b,c or a list methods: in the configuration"
    )
    assert refused(config, ["local"], seeds=0) == ("there is no seed to run\n  where: seeds\n  fix:   give at least 1")


@pytest.mark.parametrize(
    ("methods", "label"),
    [
        (["local", "fedavg", "local"], "local"),
        ([FuseFL(num_blocks=1), FuseFL(num_blocks=2)], "fusefl"),
        ([{"name": "local", "label": "a b"}, {"name": "fedavg", "label": "a_b"}], "a b"),
    ],
)
def test_two_methods_of_one_label(config: dict[str, Any], methods: Any, label: str) -> None:
    assert refused(config, methods) == (
        f'the method "{label}" is given twice\n  where: methods\n  fix:   give each a label of its own'
    )


@pytest.mark.parametrize("label", ["journal", "clients", "figures", "..", "a/../../b", "/etc"])
def test_a_label_never_names_a_folder_that_is_not_its_own(config: dict[str, Any], label: str, tmp_path: Path) -> None:
    home = tmp_path / "inside" / "home"
    board = fedfuse.compare(config, [{"name": "local", "label": label}], out=home)
    assert board["rows"][0]["method"] == label
    folder = (home / board["rows"][0]["runs"][0]).resolve()
    assert folder.parent.parent == home.resolve()
    assert folder.parent.name not in ("journal", "clients", "figures")
    assert {path.name for path in tmp_path.iterdir()} == {"inside"}
    assert {path.name for path in (tmp_path / "inside").iterdir()} == {"home"}


@pytest.mark.parametrize(
    ("methods", "wanted"),
    [
        (
            ["local", "fusefl[num_block=2]"],
            'unknown setting "num_block"\n  where: method.num_block\n  fix:   did you mean "num_blocks"? known: ',
        ),
        (["local", "fedvg"], 'there is no method "fedvg"\n  fix:   did you mean "fedavg"? known: '),
        (["fusefl[num_blocks=2"], '"fusefl[num_blocks=2" lacks its closing bracket\n  where: methods\n'),
        (["fusefl[num_blocks]"], '"num_blocks" is no setting\n  where: methods\n'),
        (
            [{"label": "x"}],
            "a method has no name: {'label': 'x'}\n  where: methods\n  fix:   write {name: fusefl, ...}",
        ),
        ([3], "a method has no name: 3\n  where: methods\n"),
        (["fedavg[num_rounds=0]"], "num_rounds is 0\n  where: method.num_rounds\n"),
    ],
)
def test_a_mistake_in_the_last_method_is_told_before_the_first_runs(
    config: dict[str, Any], methods: Any, wanted: str
) -> None:
    assert refused(config, methods).startswith(wanted)


def test_a_list_of_methods_in_the_configuration_is_checked(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        fedfuse.compare({**config, "methods": "fusefl"})


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", []),
        ("a", ["a"]),
        ("a,b , c", ["a", "b", "c"]),
        ("a[x=1,y={z: 2, w: 3}],b", ["a[x=1,y={z: 2, w: 3}]", "b"]),
        (",a,,b,", ["a", "b"]),
    ],
)
def test_commas_in_brackets_do_not_split(text: str, parts: list[str]) -> None:
    assert split_outside_brackets(text) == parts
