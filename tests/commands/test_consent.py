"""What may leave a client is shown and asked, and a no keeps it here."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path

import pytest
import torch
from rich.console import Console
from rich.table import Table

import fedfuse.methods  # noqa: F401 - the declarations come from there
from fedfuse.commands.consent import Consent, TerminalOwner, declared_uploads, preview_table
from fedfuse.core.client import Request
from fedfuse.core.describing import UploadRow
from fedfuse.core.errors import ConfigError
from fedfuse.core.payload import Payload

UPLOAD = Payload({"model/weight": torch.zeros(2, 3), "num_examples": 7}).encode()


def request(answer_key: str = "ab" * 20) -> Request:
    return Request(
        method="fedavg",
        settings={},
        task="train_local",
        exchange="local_models",
        client_id="a",
        seed=0,
        lineage="",
        answer_key=answer_key,
        payload=b"",
    )


class Decided:
    """An owner who says the same every time."""

    def __init__(self, answer: bool) -> None:
        self.answer = answer
        self.asked: list[str] = []

    def say(self, text: str) -> None:
        raise AssertionError(text)

    def allows(self, table: Table, question: str) -> bool:
        self.asked.append(question)
        return self.answer


def decide(consent: Consent, owner: Decided) -> str:
    """Decide in one thread as the message's process does, and ask in this one."""
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(consent.decide(request(), UPLOAD)))
    thread.start()
    while thread.is_alive():
        consent.ask(owner)
        thread.join(0.01)
    return found[0]


def test_without_a_preview_everything_that_is_declared_may_leave(tmp_path: Path) -> None:
    assert Consent(tmp_path).decide(request(), UPLOAD) == ""


@pytest.mark.parametrize("pattern", ["num_examples", "model/*"])
def test_refused_keys_stay(tmp_path: Path, pattern: str) -> None:
    reason = Consent(tmp_path, refuse=["other/*", pattern]).decide(request(), UPLOAD)
    assert reason.endswith(" must not leave this client")


def test_a_yes_is_asked_once_and_remembered(tmp_path: Path) -> None:
    owner = Decided(True)
    consent = Consent(tmp_path, previews=True)
    assert decide(consent, owner) == ""
    assert owner.asked == [f"fedavg asks train_local: send these {len(UPLOAD)} B?"]
    assert Consent(tmp_path, previews=True).decide(request(), UPLOAD) == ""
    kept = json.loads((tmp_path / "consent" / f"{request().answer_key}.json").read_text())
    assert kept["allowed"] is True
    assert [row["key"] for row in kept["rows"]] == ["model/weight", "num_examples"]


def test_a_no_keeps_it_here_and_may_be_asked_again(tmp_path: Path) -> None:
    owner = Decided(False)
    consent = Consent(tmp_path, previews=True)
    assert decide(consent, owner) == "its owner said no"
    assert decide(consent, owner) == "its owner said no"
    assert len(owner.asked) == 2


def test_a_question_of_an_earlier_process_is_forgotten(tmp_path: Path) -> None:
    (tmp_path / "consent").mkdir()
    (tmp_path / "consent" / "x.question.json").write_text("{}")
    Consent(tmp_path, previews=True).ask(Decided(True))
    assert list((tmp_path / "consent").iterdir()) == []


def test_the_declaration_is_the_task_s(tmp_path: Path) -> None:
    assert "num_examples" in declared_uploads(request())


def test_many_rows_are_summed_up() -> None:
    rows = [UploadRow(f"k{i:02}", "float32", "1", i, "a part") for i in range(42)]
    console = Console(file=io.StringIO(), width=120)
    console.print(preview_table(rows, "block_0"))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.startswith("block_0: what would leave this machine")
    assert "and 2 smaller" in text
    assert "k41" in text
    assert "k00" not in text


@pytest.mark.parametrize(("answers", "allowed"), [(["y"], True), (["", "what?", "YES"], True), (["n"], False)])
def test_the_owner_answers_y_or_n(monkeypatch: pytest.MonkeyPatch, answers: list[str], allowed: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, color_system=None)
    monkeypatch.setattr("builtins.input", lambda: answers.pop(0))
    assert TerminalOwner(console=console).allows(Table("key"), "send [these]?") is allowed
    assert answers == []
    assert "send [these]? [y/n] " in console.file.getvalue()  # type: ignore[attr-defined]


def test_an_owner_who_leaves_has_not_said_yes(monkeypatch: pytest.MonkeyPatch) -> None:
    def leave() -> str:
        raise EOFError

    monkeypatch.setattr("builtins.input", leave)
    assert not TerminalOwner(console=Console(file=io.StringIO(), force_terminal=True)).allows(Table("key"), "send?")


def test_no_terminal_means_saying_so_before() -> None:
    console = Console(file=io.StringIO())
    with pytest.raises(ConfigError) as caught:
        TerminalOwner(previews=True, console=console)
    assert str(caught.value) == (
        "there is no terminal to ask the owner at\n"
        "  where: --preview\n"
        "  fix:   give --yes to print what leaves and send it, and --refuse 'moments/*' for what must not leave"
    )
    owner = TerminalOwner(previews=True, says_yes=True, console=console)
    assert owner.allows(Table("key"), "send?")
    assert "send? yes (--yes)" in console.file.getvalue()  # type: ignore[attr-defined]
