"""What a terminal shows while a run or a comparison is under way."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live as Screen
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from fedfuse.experiment import Observer, Result
from fedfuse.report.units import format_percent, format_seconds, in_words, shorten

_SEED_COLUMNS = 18


@dataclass(frozen=True)
class RunState:
    """Where one run of a comparison stands.

    Args:
        word: ``waiting``, ``running``, ``done``, ``done before`` or ``interrupted``.
        accuracy: on the test set; ``None`` without one, or before the end.
        seconds: that the run took; ``None`` before the end.
    """

    word: str = "waiting"
    accuracy: float | None = None
    seconds: float | None = None


class Live(Observer):
    """A table of a comparison's runs, and a progress bar per exchange and for the server's work.

    On a terminal both move, in a log each run that ends is a line.

    Args:
        console: where; the terminal's error stream if left out.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            TimeElapsedColumn(),
            console=self.console,
        )
        self._tasks: dict[str, TaskID] = {}
        self._fractions: dict[str, float] = {}
        self._label = ""
        self._title = ""
        self._seeds: list[int] = []
        self._states: dict[tuple[str, int], RunState] = {}
        self._current: tuple[str, int] | None = None
        self._screen = Screen(
            console=self.console, get_renderable=self.picture, refresh_per_second=4, transient=True, auto_refresh=True
        )

    def __enter__(self) -> Live:
        if self.console.is_terminal:
            self._screen.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._current is not None:
            self._states[self._current] = RunState("interrupted")
        self._clear()
        if self.console.is_terminal:
            # After an error the table stays: it says what is there already.
            self._screen.transient = error is None
            self._screen.stop()

    def comparison_started(self, labels: Sequence[str], seeds: Sequence[int], varied: Mapping[str, Any]) -> None:
        """Begin a new table.

        Args:
            labels: the methods' labels.
            seeds: the seeds that each runs with.
            varied: the settings that differ from the other comparisons.
        """
        self._title, self._seeds = in_words(varied), list(seeds)
        self._states = {(label, seed): RunState() for label in labels for seed in seeds}
        if varied and not self.console.is_terminal:
            self._say(f"{self._title}:")

    def run_started(self, label: str, seed: int, position: int, total: int) -> None:
        """Show which run of a comparison begins.

        Args:
            label: the method's label.
            seed: the run's seed.
            position: 1 to total.
            total: runs in all.
        """
        self._clear()
        self._current = (label, seed)
        self._states[label, seed] = RunState("running")
        self._label = f"[{position}/{total}] {label}, seed {seed}: "

    def run_found(self, label: str, seed: int, facts: Mapping[str, Any]) -> None:
        """Show a run that an earlier command finished.

        Args:
            label: the method's label.
            seed: the run's seed.
            facts: what its ``result.json`` holds.
        """
        self._end(RunState("done before", facts.get("accuracy"), facts.get("ledger", {}).get("wall_seconds")))
        if not self.console.is_terminal:
            self._say(f"{self._label}{_accuracy_words(facts.get('accuracy'))}, done before")

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
        missing = f", missing: {', '.join(result.missing)}" if result.missing else ""
        in_table = self._current is not None and self.console.is_terminal
        self._end(RunState("done", result.accuracy, result.ledger.get("wall_seconds")))
        if not in_table or missing:
            self._say(f"{self._label or result.method + ': '}{_accuracy_words(result.accuracy)}{missing}")

    def note(self, text: str) -> None:
        """Print a sentence above the bars.

        Args:
            text: one sentence.
        """
        self._say(f"note: {text}")

    def table(self) -> Table:
        """The comparison as it stands: method by seed; of many methods those about the one that runs."""
        labels = list(dict.fromkeys(label for label, _ in self._states))
        wide = len(self._seeds) * _SEED_COLUMNS + 34 <= self.console.width
        table = Table(box=None, pad_edge=False, header_style="dim", title=escape(self._title) or None)
        table.title_justify = "left"
        table.add_column("method")
        for name in [f"seed {seed}" for seed in self._seeds] if wide else ["seeds"]:
            table.add_column(name, justify="right", min_width=_SEED_COLUMNS - 2)
        room = max(5, self.console.height - 9)
        at = labels.index(self._current[0]) if self._current and self._current[0] in labels else 0
        first = max(0, min(at - room // 2, len(labels) - room))
        for label in labels[first : first + room]:
            states = [self._states[label, seed] for seed in self._seeds]
            cells = [_cell(state) for state in states] if wide else [_summary(states)]
            table.add_row(escape(shorten(label, 34)), *cells)
        if len(labels) > room:
            over = sum(state.word.startswith("done") for state in self._states.values())
            table.caption = f"{over} of {len(self._states)} done, {len(labels) - room} hidden"
        return table

    def picture(self) -> Group:
        """What is on the screen: the table of a comparison, and the bars."""
        return Group(self.table(), self._bars) if len(self._states) > 1 else Group(self._bars)

    def _end(self, state: RunState) -> None:
        self._clear()
        if self._current is not None:
            self._states[self._current] = state
            self._current = None

    def _say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False)

    def _task(self, what: str, total: int) -> TaskID:
        if what not in self._tasks:
            self._tasks[what] = self._bars.add_task(self._label + what, total=total, detail="")
        return self._tasks[what]

    def _clear(self) -> None:
        for task in self._tasks.values():
            self._bars.remove_task(task)
        self._tasks = {}
        self._fractions = {}


def _accuracy_words(accuracy: float | None) -> str:
    return "no test set" if accuracy is None else f"accuracy {accuracy:.1%}"


def _cell(state: RunState) -> str:
    """A run in a few letters, with rich's markup."""
    if state.word == "waiting":
        return "[dim]\u00b7[/dim]"
    if not state.word.startswith("done"):
        return f"[bold]{state.word}[/bold]" if state.word == "running" else f"[red]{state.word}[/red]"
    text = f"{format_percent(state.accuracy)} {format_seconds(state.seconds):>9}"
    return text if state.word == "done" else f"[dim]{text}[/dim]"


def _summary(states: Sequence[RunState]) -> str:
    """All seeds of a method in one cell, where there is no room for each."""
    over = [state for state in states if state.word.startswith("done")]
    scores = [state.accuracy for state in over if state.accuracy is not None]
    words = f"{len(over)} of {len(states)}"
    if scores:
        words += f", mean {format_percent(statistics.fmean(scores))}"
    return words + (", running" if any(state.word == "running" for state in states) else "")
