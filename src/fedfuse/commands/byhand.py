"""``fedfuse contribute`` and ``fedfuse fuse INBOX``: a federation whose messages people carry."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.prompt import Confirm
from rich.table import Table

from fedfuse.commands.live import Live
from fedfuse.core.client import Request
from fedfuse.core.describing import UploadRow
from fedfuse.core.errors import ConfigError
from fedfuse.experiment import folder_name, method_entry, read_config
from fedfuse.experiment.configuration import NamedSection
from fedfuse.experiment.contributing import check_out, contribute, default_home
from fedfuse.experiment.inbox import UNASKED, InboxResult, fuse_inbox
from fedfuse.report import print_result, write_report
from fedfuse.report.units import format_bytes

_MOST_ROWS = 30


def contribute_and_tell(
    config: Path | None,
    name: str,
    data: Path | None,
    *,
    out: str,
    source: str,
    settings: Sequence[str],
    request: str | None,
    home: Path | None,
    key: Path | None,
    server_key: str,
    preview: bool,
    refuse: Sequence[str],
    device: str,
) -> None:
    """Write a contribution and say what is in it.

    Args:
        config: the federation's configuration.
        name: the client.
        data: where its data are.
        out: path or URL of the file.
        source: how to read the data.
        settings: ``key=value`` of that source.
        request: path or URL of the server's request.
        home: folder of what the client keeps.
        key: its signing key.
        server_key: public key that the request must bear.
        preview: ask before anything is written.
        refuse: keys that must not leave.
        device: ``cpu`` or ``cuda``.

    Raises:
        ConfigError: a preview is asked for and there is nobody to ask.
    """
    if preview and not sys.stdin.isatty():
        raise ConfigError(
            "there is no terminal to ask at", where="--preview", fix="leave it out and name what must stay by --refuse"
        )
    console = Console()

    def approve(asked: Request, rows: Sequence[UploadRow]) -> bool:
        console.print(upload_table(asked, rows) if preview else summary_table(asked, rows))
        return not preview or Confirm.ask("may this leave?", console=console)

    with Progress(console=console, transient=True) as bar:
        work = bar.add_task(name, total=None)

        def progress(done: int, total: int) -> None:
            bar.update(work, completed=done, total=total)

        def ask_below_the_bar(asked: Request, rows: Sequence[UploadRow]) -> bool:
            bar.stop()
            return approve(asked, rows)

        done = contribute(
            None if config is None else read_config(config),
            name,
            data,
            out=check_out(out),
            source=source,
            settings=settings,
            request=request,
            home=home or default_home(name),
            key=key,
            server_key=server_key,
            refuse=refuse,
            device=device,
            approve=ask_below_the_bar,
            progress=progress,
        )
    again = " (computed before)" if done.from_earlier else ""
    console.print(f"wrote {done.place}: {format_bytes(done.num_bytes)}{again}", soft_wrap=True)
    console.print(f"{name} signs with the key {done.public_key}", soft_wrap=True)


def upload_table(request: Request, rows: Sequence[UploadRow]) -> Table:
    """What would leave a client, as a table.

    Args:
        request: the question that it answers.
        rows: key by key.
    """
    table = Table(title=_heading(request, rows), title_justify="left")
    for heading in ("key", "type", "shape or value", "bytes", "what it is"):
        table.add_column(heading, justify="right" if heading == "bytes" else "left")
    for row in rows[:_MOST_ROWS]:
        table.add_row(row.key, row.kind, row.shape, f"{row.num_bytes:,}", row.what)
    if len(rows) > _MOST_ROWS:
        table.add_row(f"... and {len(rows) - _MOST_ROWS} more", "", "", "", "fedfuse inspect FILE shows all")
    return table


def summary_table(request: Request, rows: Sequence[UploadRow]) -> Table:
    """What would leave a client, as a table with a row for each part of the task's declaration.

    Args:
        request: the question that it answers.
        rows: key by key.
    """
    table = Table(title=_heading(request, rows), title_justify="left")
    for heading in ("what it is", "keys", "bytes"):
        table.add_column(heading, justify="left" if heading == "what it is" else "right")
    groups: dict[str, list[UploadRow]] = {}
    for row in rows:
        groups.setdefault(row.what or row.key, []).append(row)
    for what, members in groups.items():
        table.add_row(what, f"{len(members)}", f"{sum(row.num_bytes for row in members):,}")
    return table


def _heading(request: Request, rows: Sequence[UploadRow]) -> str:
    total = format_bytes(sum(row.num_bytes for row in rows))
    return f'what leaves {request.client_id} for "{request.exchange}" of {request.method}: {len(rows)} keys, {total}'


def fuse_and_tell(
    inboxes: Sequence[str], config: Path, settings: Sequence[str], out: Path | None, *, method: str = ""
) -> bool:
    """Fuse what is there and say what is missing.

    Args:
        inboxes: folders, URLs or files.
        config: the federation's configuration.
        settings: overrides, ``key=value``.
        out: the run's folder.
        method: instead of the configuration's, ``name[key=value,...]``.

    Returns:
        Whether there is a result.
    """
    checked = read_config(config, settings)
    if method:
        section = NamedSection(**method_entry(method, checked)[1])
        checked = checked.model_copy(update={"method": section})
    folder = out or Path("runs") / folder_name(checked)
    with Live() as live:
        found = fuse_inbox(inboxes, checked, folder, observer=live)
    console = Console(soft_wrap=True, highlight=False)
    for place, reason in found.refused.items():
        console.print(f"not used: {place}: {reason}")
    for place in found.unasked:
        console.print(f"not asked for: {place}: {UNASKED}")
    for client_id, reason in found.missing.items():
        console.print(f"missing: {client_id}: {' '.join(reason.split())}")
    if found.result is None:
        _tell_waiting(console, found, config, folder)
        return False
    print_result(found.result.facts)
    console.print(f"report: {write_report(folder)}")
    return True


def _tell_waiting(console: Console, found: InboxResult, config: Path, folder: Path) -> None:
    names = ", ".join(found.missing)
    if found.request is not None:
        console.print(
            f'waiting for {len(found.missing)} clients to answer "{found.exchange}". Send them {found.request};'
        )
        console.print(
            f"each answers: fedfuse contribute --request {found.request.name} --name NAME --data DATA --out FILE.fed"
        )
    elif names:
        console.print(f"waiting for {names}: fedfuse contribute {config} --name NAME --data DATA --out NAME.fed")
    else:
        console.print(
            f"no contribution is there yet: fedfuse contribute {config} --name NAME --data DATA --out NAME.fed"
        )
    console.print(f"What came is kept in {folder}; the same command goes on when more is there.")
