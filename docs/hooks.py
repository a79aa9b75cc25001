"""Pages that the site makes by itself, so that no list is kept by hand.

The reference has one page per room of the package, with all its public modules; the navigation lists every method
card that is in ``docs/methods``.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

_ROOT = Path(__file__).resolve().parents[1]
_PACKAGE = _ROOT / "src" / "fedfuse"
_CARDS = _ROOT / "docs" / "methods"


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the method cards and the reference pages into the navigation."""
    for section in config.nav or []:
        if "Methods" in section:
            section["Methods"] = ["methods/index.md", *(f"methods/{card.name}" for card in _cards())]
        if "Reference" in section:
            section["Reference"] = ["reference/index.md", *(f"reference/{room}.md" for room in _rooms())]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the reference pages."""
    for room, modules in _rooms().items():
        text = f"# {room}\n\n" + "\n\n".join(f"::: {module}" for module in modules) + "\n"
        files.append(File.generated(config, f"reference/{room}.md", content=text))
    return files


def on_env(env: Any, config: MkDocsConfig, files: Files) -> Any:
    """Fail where a card lacks a part of the common form."""
    wanted = _headings(_CARDS / "_template.md")
    for card in _cards():
        missing = [heading for heading in wanted if heading not in _headings(card)]
        if missing:
            raise SystemExit(f"docs/methods/{card.name} lacks the part {missing[0]!r}: see docs/methods/_template.md")
    return env


def _cards() -> list[Path]:
    return sorted(card for card in _CARDS.glob("*.md") if card.stem != "index" and not card.stem.startswith("_"))


def _headings(page: Path) -> list[str]:
    return [line.rstrip() for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("## ")]


def _rooms() -> dict[str, list[str]]:
    """Room to its public modules; modules without a public class, function or constant are left out."""
    rooms: dict[str, list[str]] = {}
    for path in sorted(_PACKAGE.rglob("*.py")):
        parts = path.relative_to(_PACKAGE).with_suffix("").parts
        if any(part.startswith("_") for part in parts) or not _has_public_names(path):
            continue
        rooms.setdefault(parts[0], []).append(".".join(("fedfuse", *parts)))
    return rooms


def _has_public_names(path: Path) -> bool:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    kinds = (ast.FunctionDef, ast.ClassDef)
    return any(isinstance(node, kinds) and not node.name.startswith("_") for node in tree.body)
