"""Habits that no linter checks: names, cards, paths, and that every list of versions holds what is used."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

BANNED_NAMES = {"util", "utils", "helper", "helpers", "misc", "common", "tools"}
TEXT = {".py", ".md", ".toml", ".yml", ".yaml", ".txt", ".cff", ".sh", ""}


def _files(repository: Path, *folders: str) -> list[Path]:
    found = [path for folder in folders for path in sorted((repository / folder).rglob("*")) if path.is_file()]
    return [
        path for path in found if "__pycache__" not in path.parts and not any(p.startswith(".") for p in path.parts)
    ]


def test_no_file_or_folder_has_a_name_that_says_nothing(repository: Path) -> None:
    paths = [path.relative_to(repository) for path in _files(repository, "src", "tests", "benchmarks", "examples")]
    bad = [str(path) for path in paths if BANNED_NAMES & {part.removesuffix(".py") for part in path.parts}]
    assert bad == []


def test_no_path_of_a_single_machine_is_written_down(repository: Path) -> None:
    # In pieces, so that this file does not hold what it looks for.
    pattern = re.compile("(?<![A-Za-z0-9.])(/" + "work/|/" + "home/[a-z]|/" + "root/|/" + "Users/)")
    top = [path for path in sorted(repository.iterdir()) if path.is_file()]
    files = [p for p in top + _files(repository, "src", "tests", "docs", "examples", "papers") if p.suffix in TEXT]
    bad = [
        f"{p.relative_to(repository)}" for p in files if pattern.search(p.read_text(encoding="utf-8", errors="ignore"))
    ]
    assert bad == []


def test_every_method_has_a_card_and_every_card_a_method(repository: Path) -> None:
    from fedfuse.core.registry import METHODS

    own = {name for name in METHODS.names() if METHODS.get(name).__module__.startswith("fedfuse.")}
    cards = {path.stem for path in (repository / "docs" / "methods").glob("*.md")} - {"index", "_template"}
    assert cards == own


def test_every_card_has_the_parts_of_the_common_form(repository: Path) -> None:
    folder = repository / "docs" / "methods"
    wanted = re.findall(r"^## .+$", (folder / "_template.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert wanted == ["## Idea", "## Exchanges and uploads", "## Settings", "## Departures", "## Results", "## Cost"]
    for card in sorted(folder.glob("*.md")):
        if card.stem != "index":
            found = re.findall(r"^## .+$", card.read_text(encoding="utf-8"), flags=re.MULTILINE)
            assert found == wanted, card.name


def test_every_dependency_is_pinned_to_the_tested_version(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = [line for lines in project["optional-dependencies"].values() for line in lines]
    wanted = {_normal(re.split(r"[\[<>=!~; ]", line)[0]) for line in project["dependencies"] + extras} - {"fedfuse"}
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {_normal(line.split("==")[0]) for line in lines if line and not line.startswith("#")}
    assert sorted(wanted - pins) == []


def test_version_is_the_same_everywhere(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = (repository / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {project['version']}\n" in citation
    assert f"\n## {project['version']}\n" in (repository / "CHANGELOG.md").read_text(encoding="utf-8")


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
