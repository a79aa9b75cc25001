"""Try the named faults and write the table.

    python benchmarks/faults/run.py                        # all of them; takes about half an hour on two cores
    python benchmarks/faults/run.py --only "disk full"     # a family, or part of a fault's name
    python benchmarks/faults/run.py --list
    python benchmarks/faults/run.py --docs docs/reliability.md     # only put the table so far into the page

Writes ``faults.json`` and ``faults.md`` into ``--out``; a trial that is run again replaces its line.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import byhand
import decoders
import deployment
import flower_network
import load
import local
from outcome import TRIALS, Outcome, attempt

FAMILIES = (decoders, local, byhand, flower_network, deployment, load)
"""Importing a family registers its trials."""

_BEGIN, _END = "<!-- faults: begin -->", "<!-- faults: end -->"


def markdown(lines: Sequence[dict[str, Any]]) -> str:
    """The table that is printed and reported.

    Args:
        lines: outcomes as JSON.
    """
    text = []
    for family in dict.fromkeys(line["family"] for line in lines):
        text += [f"### {family[:1].upper()}{family[1:]}", "", "| fault | what happened | digest | told |"]
        text += ["|---|---|---|---|"]
        for line in lines:
            if line["family"] == family:
                verdict = "" if line["verdict"] == "held" else f"**{line['verdict']}**: "
                cells = [line["fault"], line["happened"], line["digest"] or "-", line["message"] or "-"]
                fault, happened, digest, told = map(_cell, cells)
                text.append(f"| {fault} | {verdict}{happened} | {digest} | {told} |")
        text.append("")
    return "\n".join(text)


def _cell(text: str) -> str:
    flat = re.sub(r"(/[^\s/]+)*/fedfuse-faults-[^\s/]+(/\d+)?", "...", " ".join(text.split()))
    flat = flat.replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
    return flat if len(flat) <= 420 else flat[:417] + "..."


def merged(path: Path, outcomes: Sequence[Outcome]) -> list[dict[str, Any]]:
    """Earlier lines with the new ones in their places.

    Args:
        path: of the earlier table; need not be there.
        outcomes: the new lines.
    """
    lines = {}
    if path.is_file():
        lines = {(line["family"], line["fault"]): line for line in json.loads(path.read_text(encoding="utf-8"))}
    lines.update({(outcome.family, outcome.fault): outcome.to_json() for outcome in outcomes})
    return [lines[key] for key in TRIALS if key in lines]


def publish(lines: Sequence[dict[str, Any]], page: Path) -> None:
    """Put the table into a page, between its two marks.

    Args:
        lines: outcomes as JSON.
        page: a page that has the marks.
    """
    before, _, rest = page.read_text(encoding="utf-8").partition(_BEGIN)
    _, _, after = rest.partition(_END)
    page.write_text(f"{before}{_BEGIN}\n\n{markdown(lines)}\n{_END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="a family, or part of a fault's name")
    parser.add_argument("--out", type=Path, default=Path("runs") / "faults")
    parser.add_argument("--list", action="store_true", help="only print the names")
    parser.add_argument("--docs", type=Path, help="a page to put the table so far into; nothing is tried")
    parser.add_argument("--keep", action="store_true", help="keep the folder that the faults were tried in")
    arguments = parser.parse_args()
    chosen = [key for key in TRIALS if arguments.only in (key[0], "") or arguments.only in key[1]]
    if arguments.list:
        print("\n".join(f"{family}: {name}" for family, name in chosen))
        return
    if arguments.docs is not None:
        publish(merged(arguments.out / "faults.json", []), arguments.docs)
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    scratch, outcomes = Path(tempfile.mkdtemp(prefix="fedfuse-faults-")), []
    try:
        for number, (family, name) in enumerate(chosen):
            home = scratch / str(number)
            home.mkdir()
            outcomes.append(attempt(family, name, home))
            last = outcomes[-1]
            print(f"{last.verdict:<8} {family}: {name} ({last.seconds:g} s)\n         {last.happened}", flush=True)
            # Written after every trial: a table that is half there is better than none.
            lines = merged(arguments.out / "faults.json", outcomes)
            (arguments.out / "faults.json").write_text(json.dumps(lines, indent=1), encoding="utf-8")
            (arguments.out / "faults.md").write_text(markdown(lines), encoding="utf-8")
            if not arguments.keep:
                shutil.rmtree(home, ignore_errors=True)
    finally:
        if not arguments.keep:
            shutil.rmtree(scratch, ignore_errors=True)
    print("\n" + markdown([outcome.to_json() for outcome in outcomes]))
    failed = [outcome for outcome in outcomes if outcome.verdict == "FAILED"]
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
