"""What a terminal shows while a run is under way."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from fedfuse.experiment import Observer, Result


class Live(Observer):
    """A progress bar per exchange and for the server's work; on a terminal it moves, in a log it prints lines."""

    def __init__(self) -> None:
        self.console = Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}"),
            TimeElapsedColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._fractions: dict[str, float] = {}
        self._label = ""

    def __enter__(self) -> Live:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def run_started(self, label: str, seed: int, position: int, total: int) -> None:
        """Show which run of a comparison begins.

        Args:
            label: the method's label.
            seed: the run's seed.
            position: 1 to total.
            total: runs in all.
        """
        self._clear()
        self._label = f"[{position}/{total}] {label}, seed {seed}: "

    def exchange(self, key: str, client_id: str, done: int, total: int, fraction: float) -> None:
        """Move an exchange's bar.

        Args:
            key: the exchange.
            client_id: the client; empty at the start.
            done: clients that are done.
            total: clients asked.
            fraction: of this client's work.
        """
        task = self._task(f"clients: {key}", total)
        if client_id:
            self._fractions[client_id] = fraction
        working = sum(part for part in self._fractions.values() if part < 1)
        if done == total:
            self._fractions = {}
        detail = f"{client_id} {fraction:.0%}" if client_id and fraction < 1 else client_id
        self._bars.update(task, completed=min(total, done + int(working)), detail=detail)

    def server(self, what: str, done: int, total: int) -> None:
        """Move the bar of the server's work.

        Args:
            what: a few words.
            done: steps done.
            total: steps in all.
        """
        self._bars.update(self._task(f"server: {what}", total), completed=done, detail="")

    def run_ended(self, result: Result) -> None:
        """Say what a run gave.

        Args:
            result: what came out.
        """
        accuracy = "no test set" if result.accuracy is None else f"accuracy {result.accuracy:.1%}"
        missing = f", missing: {', '.join(result.missing)}" if result.missing else ""
        self._clear()
        self.console.print(f"{self._label or result.method + ': '}{accuracy}{missing}", markup=False, highlight=False)

    def note(self, text: str) -> None:
        """Print a sentence above the bars.

        Args:
            text: one sentence.
        """
        self.console.print(f"note: {text}", markup=False, highlight=False)

    def _task(self, what: str, total: int) -> TaskID:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(self._label + what, total=total, detail="")
        return self._tasks[what]

    def _clear(self) -> None:
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks = {}
