"""What a trial of a fault says, and the list of all trials."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

SAME, ALL_THERE, NO_RUN = "same", "same once all are there", "no run"
"""What the final digest is beside the undisturbed one's."""


class Skipped(Exception):
    """The machine cannot show this fault; says why."""


@dataclass(frozen=True)
class Seen:
    """What happened when a fault was tried and everything that must hold held.

    Args:
        happened: in words, with numbers.
        digest: the artifact's digest beside that of the undisturbed run.
        message: what the reader of the terminal or the report was told.
    """

    happened: str
    digest: str
    message: str = ""


@dataclass(frozen=True)
class Outcome:
    """One line of the table.

    Args:
        family: of faults.
        fault: its name.
        verdict: ``held``, ``FAILED`` or ``skipped``.
        happened: in words.
        digest: beside the undisturbed run's.
        message: what was told.
        seconds: how long the trial took.
    """

    family: str
    fault: str
    verdict: str
    happened: str
    digest: str
    message: str
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The line as JSON."""
        return asdict(self)


Trial = Callable[[Path], Seen]
TRIALS: dict[tuple[str, str], Trial] = {}
"""Family and fault to the trial, in the order of the table."""


def fault(family: str, name: str) -> Callable[[Trial], Trial]:
    """Register a trial.

    Args:
        family: of faults.
        name: the fault, in words.
    """

    def register(trial: Trial) -> Trial:
        TRIALS[family, name] = trial
        return trial

    return register


def attempt(family: str, name: str, home: Path) -> Outcome:
    """Carry out one trial.

    Args:
        family: of faults.
        name: the fault.
        home: an empty folder for it.

    Returns:
        What happened; an assertion that does not hold makes it ``FAILED``.
    """
    start = time.perf_counter()
    try:
        seen = TRIALS[family, name](home)
        verdict = "held"
    except Skipped as reason:
        seen, verdict = Seen(str(reason), ""), "skipped"
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        seen = Seen(f"{type(error).__name__}: {error} ({Path(place.filename).name}:{place.lineno})", "")
        verdict = "FAILED"
    seconds = round(time.perf_counter() - start, 1)
    return Outcome(family, name, verdict, seen.happened, seen.digest, seen.message, seconds)


def check(holds: object, otherwise: str) -> None:
    """Demand something of a trial.

    Args:
        holds: true if it is so.
        otherwise: what is wrong if it is not.

    Raises:
        AssertionError: it is not so.
    """
    if not holds:
        raise AssertionError(otherwise)


def said(text: str, *wanted: str) -> str:
    """The part of a command's words that tells what is wrong and what to do.

    Args:
        text: what was printed.
        wanted: parts that must be there.

    Returns:
        The message in one line.
    """
    flat = " ".join(text.split())
    for part in wanted:
        check(" ".join(part.split()) in flat, f"the message does not say {part!r}: {flat[-600:]}")
    check("Traceback" not in text, f"a traceback: {flat[-600:]}")
    start = flat.find("error: ")
    return flat[start:] if start >= 0 else flat
