"""What may leave a client: its owner sees it before anything is sent, and decides."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.table import Table
from rich.text import Text

from fedfuse.core.client import Request
from fedfuse.core.describing import UploadRow, refused_key, upload_rows
from fedfuse.core.errors import ConfigError
from fedfuse.core.files import write_atomically
from fedfuse.core.method import task_spec
from fedfuse.core.registry import METHODS
from fedfuse.report.units import format_bytes

_POLL_S = 0.2
_MAX_ROWS = 40


class Owner(Protocol):
    """Whoever decides about a client's data."""

    def say(self, text: str) -> None:
        """Tell the owner something.

        Args:
            text: one sentence.
        """
        ...

    def allows(self, table: Table, question: str) -> bool:
        """Show what would leave, and ask.

        Args:
            table: what it is.
            question: to be answered by yes or no.
        """
        ...


class Consent:
    """Decides in the process that answers a message, and asks in the process that has the terminal.

    The two meet in the client's folder, where each decision stays.

    Args:
        folder: the client's home.
        refuse: keys or ``group/*`` that must not leave.
        previews: ask the owner about each upload.
    """

    def __init__(self, folder: Path, *, refuse: Sequence[str] = (), previews: bool = False) -> None:
        self._folder, self._refuse, self._previews = folder / "consent", list(refuse), previews
        # What an earlier process was about to ask is asked anew.
        for path in self._folder.glob("*.question.json"):
            path.unlink(missing_ok=True)

    def decide(self, request: Request, upload: bytes) -> str:
        """Whether an upload may leave.

        Args:
            request: the question that it answers.
            upload: encoded.

        Returns:
            Empty if it may; else why not.
        """
        key = refused_key(upload, self._refuse)
        if key is not None:
            return f'"{key}" must not leave this client'
        if not self._previews:
            return ""
        rows = upload_rows(upload, declared_uploads(request))
        question = self._folder / f"{request.answer_key}.question.json"
        verdict = self._folder / f"{request.answer_key}.json"
        facts = {
            "method": request.method,
            "task": request.task,
            "exchange": request.exchange,
            "num_bytes": len(upload),
            "rows": [asdict(row) for row in rows],
        }
        if not verdict.exists():
            write_atomically(question, json.dumps(facts).encode())
        while not verdict.exists():
            time.sleep(_POLL_S)
        is_allowed = json.loads(verdict.read_text(encoding="utf-8"))["allowed"]
        if not is_allowed:
            # A no is for now: the same question may be asked again.
            verdict.rename(verdict.with_suffix(".refused"))
        return "" if is_allowed else "its owner said no"

    def ask(self, owner: Owner) -> None:
        """Put the open questions to the owner.

        Args:
            owner: who decides.
        """
        for path in sorted(self._folder.glob("*.question.json")):
            facts = json.loads(path.read_text(encoding="utf-8"))
            table = preview_table([UploadRow(**row) for row in facts["rows"]], facts["exchange"])
            what = f"{facts['method']} asks {facts['task']}: send these {format_bytes(facts['num_bytes'])}?"
            verdict = {**facts, "allowed": owner.allows(table, what), "at": time.time()}
            write_atomically(path.with_name(path.name.replace(".question", "")), json.dumps(verdict).encode())
            path.unlink()


def declared_uploads(request: Request) -> Mapping[str, str]:
    """What a question's task says that it sends.

    Args:
        request: the question.

    Returns:
        Pattern of keys to what they are.
    """
    task: Any = getattr(METHODS.get(request.method), request.task, None)
    spec = task_spec(task) if task is not None else None
    return {} if spec is None else dict(spec.uploads)


def preview_table(rows: Sequence[UploadRow], title: str) -> Table:
    """What would leave, as a table: the largest first where there are many.

    Args:
        rows: one per key.
        title: of the table.
    """
    table = Table(box=None, pad_edge=False, header_style="bold", title=f"{title}: what would leave this machine")
    table.title_justify = "left"
    for name in ("key", "type", "shape or value", "bytes"):
        table.add_column(name, justify="right" if name == "bytes" else "left", overflow="fold")
    table.add_column("what it is", min_width=24, overflow="fold")
    shown = sorted(sorted(rows, key=lambda row: -row.num_bytes)[:_MAX_ROWS], key=lambda row: row.key)
    said = ""
    for row in shown:
        # A model's tensors are all the same thing: said once.
        table.add_row(row.key, row.kind, row.shape, f"{row.num_bytes:,}", "" if row.what == said else row.what)
        said = row.what
    if len(rows) > len(shown):
        rest = sum(row.num_bytes for row in rows) - sum(row.num_bytes for row in shown)
        table.add_row(f"and {len(rows) - len(shown)} smaller", "", "", f"{rest:,}", "")
    return table


class TerminalOwner:
    """The owner at a terminal, or the log of a machine that nobody sits at.

    Args:
        previews: whether there will be questions.
        says_yes: answer all of them by yes; the tables are printed all the same.
        console: where; the terminal if left out.

    Raises:
        ConfigError: there will be questions and nobody to answer them.
    """

    def __init__(self, *, previews: bool = False, says_yes: bool = False, console: Console | None = None) -> None:
        self.console = console or Console()
        self._says_yes = says_yes
        if previews and not says_yes and not (self.console.is_terminal and sys.stdin.isatty()):
            raise ConfigError(
                "there is no terminal to ask the owner at",
                where="--preview",
                fix="give --yes to print what leaves and send it, and --refuse 'moments/*' for what must not leave",
            )

    def say(self, text: str) -> None:
        """Print a line with the time.

        Args:
            text: one sentence.
        """
        self.console.print(f"{time.strftime('%H:%M:%S')} {text}", markup=False, highlight=False, soft_wrap=True)

    def allows(self, table: Table, question: str) -> bool:
        """Print what would leave, and ask until the answer is y or n.

        Args:
            table: what it is.
            question: to be answered by yes or no.
        """
        self.console.print(table)
        while not self._says_yes:
            try:
                answer = self.console.input(Text(f"{question} [y/n] ")).strip().lower()
            except EOFError:
                return False
            if answer in ("y", "yes", "n", "no"):
                return answer.startswith("y")
        self.say(f"{question} yes (--yes)")
        return True
