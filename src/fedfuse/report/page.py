"""One HTML page that says what a run or a comparison found."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from fedfuse.core.errors import ConfigError
from fedfuse.core.files import write_atomically
from fedfuse.report.board_sections import board_sections, board_tiles, first_runs
from fedfuse.report.layout import Gallery, Section
from fedfuse.report.reading import Board, read_board, read_run
from fedfuse.report.run_sections import run_sections, run_tiles
from fedfuse.report.varied_sections import varied_headline, varied_sections, varied_tiles
from fedfuse.report.wording import board_headline, run_headline

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

PAGE = "report.html"


def write_report(folder: str | Path) -> Path:
    """Draw the pictures of a run or a comparison and write its page; an older page is replaced.

    The page needs no other file and no network. The pictures are also written to ``figures/``, as PNG and SVG.

    Args:
        folder: of a run (it holds ``result.json``) or of a comparison (it holds ``board.json``).

    Returns:
        Path of ``report.html``.

    Raises:
        ConfigError: the folder holds no result, or a file in it is no JSON table.
    """
    folder = Path(folder)
    gallery = Gallery(folder / "figures")
    if (folder / "board.json").is_file():
        html = _board_page(read_board(folder), folder, gallery)
    elif (folder / "result.json").is_file():
        run = read_run(folder)
        html = render_page(
            kicker=["run", run.method, f"seed {run.seed}" if run.seed else ""],
            headline=run_headline(run),
            tiles=run_tiles(run),
            sections=run_sections(run, gallery),
            versions=run.versions,
        )
    else:
        raise ConfigError(
            "there is nothing to report: neither result.json nor board.json is there",
            where=str(folder),
            fix="name the folder of a finished `fedfuse run` or `fedfuse compare`",
        )
    write_atomically(folder / PAGE, html.encode("utf-8"))
    return folder / PAGE


def _board_page(board: Board, folder: Path, gallery: Gallery) -> str:
    seeds = f"seed{'' if len(board.seeds) == 1 else 's'} {', '.join(board.seeds)}" if board.seeds else ""
    if board.varied:
        # Their pages first: this one leads to them.
        for name in board.folders:
            inside = (folder / name).resolve().is_relative_to(folder.resolve())
            if inside and (folder / name / "board.json").is_file() and (folder / name).resolve() != folder.resolve():
                write_report(folder / name)
        return render_page(
            kicker=["comparison", f"{len(board.settings)} settings", seeds],
            headline=varied_headline(board),
            tiles=varied_tiles(board),
            sections=varied_sections(board, folder, gallery),
            versions=board.versions,
        )
    runs = first_runs(board, folder)
    return render_page(
        kicker=["comparison", f"{len(board.rows)} method{'' if len(board.rows) == 1 else 's'}", seeds],
        headline=board_headline(board),
        tiles=board_tiles(board, runs),
        sections=board_sections(board, runs, folder, gallery),
        versions=board.versions,
    )


def render_page(
    *,
    kicker: Sequence[str],
    headline: Sequence[str],
    tiles: Sequence[tuple[str, str]],
    sections: Sequence[Section],
    versions: Mapping[str, Any],
) -> str:
    """Put a page together.

    Args:
        kicker: a few words above the headline; empty ones are left out.
        headline: sentences, the one that matters most first.
        tiles: name and value of the few numbers at the top.
        sections: what follows.
        versions: of the software.

    Returns:
        HTML that needs no other file and no network.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    # Everything is escaped but what is marked as markup: our own style, script and pictures. Names of classes, clients
    # and methods come from other people's data.
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    version = str(versions.get("fedfuse", "")).strip()
    return environment.from_string(_own("report.html.j2")).render(
        title=f"fedfuse · {' · '.join(part for part in kicker[:2] if part)}",
        kicker=" · ".join(["fedfuse", *(part for part in kicker if part)]),
        headline=headline[0],
        lede=" ".join(headline[1:]),
        tiles=tiles,
        sections=sections,
        footer=f"Written from the files of this folder{f' by fedfuse {version}' if version else ''}. "
        "Every picture is in figures/, as PNG and SVG.",
        css=Markup(_own("report.css")),
        script=Markup(_own("sorting.js")),
    )


def _own(name: str) -> str:
    return (resources.files("fedfuse.report") / "templates" / name).read_text(encoding="utf-8")
