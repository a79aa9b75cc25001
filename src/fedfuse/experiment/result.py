"""What a run gives back, and who hears how far it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from fedfuse.core.artifact import Artifact
from fedfuse.core.errors import ConfigError
from fedfuse.core.registry import METHODS


class Observer:
    """Hears how far a run is; the default is silent."""

    def comparison_started(self, labels: Sequence[str], seeds: Sequence[int], varied: Mapping[str, Any]) -> None:
        """A comparison begins, or the next of several on other settings.

        Args:
            labels: the methods' labels.
            seeds: the seeds that each runs with.
            varied: the settings that differ from the other comparisons; empty where there is one only.
        """

    def run_started(self, label: str, seed: int, position: int, total: int) -> None:
        """A run of a comparison begins.

        Args:
            label: the method's label.
            seed: the run's seed.
            position: 1 to total.
            total: runs in all.
        """

    def run_found(self, label: str, seed: int, facts: Mapping[str, Any]) -> None:
        """The run that just began is complete already, from an earlier command.

        Args:
            label: the method's label.
            seed: the run's seed.
            facts: what its ``result.json`` holds.
        """

    def exchange(self, key: str, client_id: str, done: int, total: int, fraction: float) -> None:
        """A client is somewhere in an exchange.

        Args:
            key: the exchange.
            client_id: the client; empty at the exchange's start.
            done: clients that are done.
            total: clients asked.
            fraction: of this client's work.
        """

    def server(self, what: str, done: int, total: int) -> None:
        """The server is somewhere in its own work.

        Args:
            what: a few words.
            done: steps done.
            total: steps in all.
        """

    def run_ended(self, result: Result) -> None:
        """A run is complete.

        Args:
            result: what came out.
        """

    def note(self, text: str) -> None:
        """Something the reader should know.

        Args:
            text: one sentence.
        """


def is_additive_run(facts: Mapping[str, Any]) -> bool:
    """Whether clients can come to a finished run, or leave it, without anybody else computing anew.

    With one exchange nobody was told anything of the others.

    Args:
        facts: what its ``result.json`` holds.
    """
    method = METHODS.get(facts["config"]["method"]["name"])
    return bool(method.is_additive) or len(facts["uploads"]) == 1


@dataclass(frozen=True)
class Result:
    """What came out of a run.

    Args:
        method: the method's label.
        accuracy: on the test set, in [0, 1]; the mean over clients where every client has a model of its own;
            ``None`` without a test set.
        clients: client id to what is known of it: examples, label counts, accuracy.
        ledger: sums of bytes, seconds and memory.
        artifact: the fused model; ``None`` where there is none.
        personal: client id to its own model, where the method gives one.
        missing: client id to the reason why it did not answer.
        facts: everything that ``result.json`` holds.
        folder: the run's folder; ``None`` for a run in memory.
    """

    method: str
    accuracy: float | None
    clients: Mapping[str, Mapping[str, Any]]
    ledger: Mapping[str, Any]
    artifact: Artifact | None
    personal: Mapping[str, Artifact]
    missing: Mapping[str, str]
    facts: Mapping[str, Any]
    folder: Path | None = None

    def module(self) -> nn.Module:
        """The fused model, working, in evaluation mode.

        Raises:
            ConfigError: the method gives no common model.
        """
        if self.artifact is None:
            raise ConfigError(f'the method "{self.method}" gives no common model', fix="look at result.personal")
        return self.artifact.module()

    def report(self) -> Path:
        """Draw the pictures and write the run's page.

        Returns:
            The page, ``report.html`` in the run's folder.

        Raises:
            ConfigError: the run was kept in memory.
        """
        from fedfuse.report import write_report

        if self.folder is None:
            raise ConfigError(
                "the run was kept in memory", where="result.report", fix="give fedfuse.run an out= folder"
            )
        return write_report(self.folder)
