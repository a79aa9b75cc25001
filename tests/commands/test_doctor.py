"""What ``fedfuse doctor`` looks at."""

from __future__ import annotations

import importlib
from typing import Any

import pytest

import fedfuse.experiment
from fedfuse.commands import doctor
from fedfuse.commands.doctor import Finding, examine
from fedfuse.core import registry


def by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.what: finding for finding in findings}


@pytest.mark.slow
def test_a_sound_installation_is_found_fine() -> None:
    findings = list(examine())
    seen = by_name(findings)
    assert all(finding.is_fine for finding in findings), [f for f in findings if not f.is_fine]
    assert {"fedfuse", "python", "torch", "numpy", "cores", "cuda", "disk", "small run"} <= set(seen)
    assert set(doctor._OPTIONAL) <= set(seen)
    assert "fusefl" in seen["methods"].seen
    assert findings[-1].seen.startswith("twice the same model, digest ")


@pytest.fixture
def without_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The small run and the imports of all optional parts take seconds, which most tests do not need."""
    monkeypatch.setattr(doctor, "_OPTIONAL", {"torchvision": "models of torchvision"})
    monkeypatch.setattr(doctor, "_small_run", lambda: Finding("small run", "left out"))


@pytest.mark.usefixtures("without_a_run")
@pytest.mark.parametrize(
    ("error", "seen"),
    [
        (ImportError("no module"), "not there (models of torchvision)"),
        (RuntimeError("operator torchvision::nms does not exist"), "broken: operator torchvision::nms does not exist"),
    ],
)
def test_an_optional_part_that_is_missing_or_broken_is_told_and_is_fine(
    monkeypatch: pytest.MonkeyPatch, error: Exception, seen: str
) -> None:
    original = importlib.import_module

    def imported(name: str, *others: Any) -> Any:
        if name == "torchvision":
            raise error
        return original(name, *others)

    monkeypatch.setattr(importlib, "import_module", imported)
    finding = by_name(list(examine()))["torchvision"]
    assert (finding.seen, finding.is_fine) == (seen, True)


@pytest.mark.usefixtures("without_a_run")
def test_a_full_disk_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 5 << 20})())
    finding = by_name(list(examine()))["disk"]
    assert (finding.seen, finding.is_fine) == ("0.0 GiB free here", False)


@pytest.mark.usefixtures("without_a_run")
def test_a_plug_in_that_fails_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry.METHODS.failed_entry_points, "broken", "ImportError: nothing there")
    findings = [f for f in examine() if "broken" in f.what or "nothing there" in f.seen]
    assert findings
    assert not any(finding.is_fine for finding in findings)


def test_a_run_that_fails_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*facts: Any, **settings: Any) -> Any:
        raise OSError("no space")

    monkeypatch.setattr(fedfuse.experiment, "run", fails)
    assert doctor._small_run() == Finding("small run", "OSError: no space", is_fine=False)


def test_runs_that_differ_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    digests = iter(["a", "b"])

    def differs(*facts: Any, **settings: Any) -> Any:
        return type("Result", (), {"facts": {"artifact": {"digest": next(digests)}}})()

    monkeypatch.setattr(fedfuse.experiment, "run", differs)
    wanted = Finding("small run", "two equal runs gave different models", is_fine=False)
    assert doctor._small_run() == wanted
