"""The command ``fedfuse``: thin. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedfuse.core.errors import ConfigError, FedfuseError

if TYPE_CHECKING:
    from fedfuse.commands.live import Live

app = typer.Typer(
    name="fedfuse",
    help="One strong model from data that cannot leave its owners, with one upload from each of them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

ConfigArgument = Annotated[Path, typer.Argument(help="A YAML configuration, or a run's config.yaml to repeat it.")]
SetOption = Annotated[
    list[str], typer.Option("--set", metavar="KEY=VALUE", help="Override a setting, e.g. method.num_blocks=8.")
]


@app.command("run")
def run_command(
    config: ConfigArgument,
    set_: SetOption = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="The run's folder; the same command continues there.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the whole configuration with its defaults; run nothing.")
    ] = False,
) -> None:
    """Run one method and write the run's folder with its report."""
    from fedfuse import experiment

    checked = experiment.read_config(config, set_)
    if dry_run:
        import yaml

        typer.echo(yaml.safe_dump(experiment.resolve(checked), sort_keys=False), nl=False)
        return
    folder = out or Path("runs") / experiment.folder_name(checked)
    with _live() as live:
        result = experiment.run(checked, out=folder, observer=live)
    from fedfuse.report import print_result, write_report

    print_result(result.facts)
    typer.echo(f"report: {write_report(folder)}")


@app.command("compare")
def compare_command(
    config: ConfigArgument,
    methods: Annotated[str, typer.Option(help="Names, with settings in brackets: local,fusefl[num_blocks=2].")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, counted from the configuration's.")] = 1,
    set_: SetOption = [],  # noqa: B006
    vary: Annotated[
        list[str],
        typer.Option(metavar="KEY=VALUE,VALUE", help="Run all with each value; with each pair where given twice."),
    ] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="The comparison's folder; the same command continues there.")] = None,
) -> None:
    """Run several methods on the same data and models; every client trains once per question."""
    from fedfuse import experiment

    checked, varied = experiment.read_config(config, set_), experiment.read_variations(vary)
    folder = out or Path("runs") / experiment.comparison_name(checked, varied)
    with _live() as live:
        board = experiment.compare(
            checked, experiment.split_outside_brackets(methods), seeds=seeds, vary=varied, out=folder, observer=live
        )
    from fedfuse.report import print_board, write_report

    print_board(board)
    typer.echo(f"report: {write_report(folder)}")


@app.command("remove")
def remove_command(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    client: Annotated[str, typer.Option(help="The client that leaves.")],
) -> None:
    """Fuse a run again without one client, exactly, and delete everything that it sent; nobody is asked."""
    from fedfuse.commands.membership import remove_client

    with _live() as live:
        facts = remove_client(run, client, live)
    from fedfuse.report import print_result, write_report

    print_result(facts)
    typer.echo(f"report: {write_report(run)}")


@app.command("add")
def add_command(
    run: Annotated[Path, typer.Argument(help="A finished run's folder.")],
    client: Annotated[str, typer.Option(help="The client that comes late.")],
    data: Annotated[
        Path | None, typer.Option(help="Its data; left out for a client that was removed and comes back.")
    ] = None,
    source: Annotated[str, typer.Option(help="How to read the data; told by the file's name if left out.")] = "",
    set_: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="A setting of that source, e.g. y_key=labels.")
    ] = [],  # noqa: B006
) -> None:
    """Fuse a run again with one client more, exactly; only this client computes."""
    from fedfuse.commands.membership import add_client

    with _live() as live:
        facts = add_client(run, client, data, source=source, settings=set_, observer=live)
    from fedfuse.report import print_result, write_report

    print_result(facts)
    typer.echo(f"report: {write_report(run)}")


@app.command("advise")
def advise_command(
    board: Annotated[
        Path, typer.Argument(help="A comparison's folder or board.json, or the configuration that was compared.")
    ],
    max_upload_bytes: Annotated[float | None, typer.Option(min=0, help="Most that one client may upload.")] = None,
    heterogeneous: Annotated[
        bool, typer.Option("--heterogeneous/--homogeneous", help="Whether clients own models of different kinds.")
    ] = False,
    server_data: Annotated[
        str | None, typer.Option(metavar="yes|no", help="Whether the server has data of its own.")
    ] = None,
    budget_s: Annotated[
        float | None, typer.Option(min=0, help="Most seconds of computing, all clients and the server together.")
    ] = None,
) -> None:
    """Say which method to choose under these constraints, from what a comparison measured."""
    from fedfuse.commands.advising import advise_on

    for line in advise_on(
        board,
        max_upload_bytes=max_upload_bytes,
        is_heterogeneous=heterogeneous,
        server_data=server_data,
        budget_s=budget_s,
    ):
        typer.echo(line)


@app.command("distill")
def distill_command(
    artifact: Annotated[Path, typer.Argument(help="An artifact's or a run's folder.")],
    student: Annotated[str, typer.Option(help="The small model, e.g. cnn[width=8].")],
    out: Annotated[Path, typer.Option(help="The result's folder; the same command continues there.")],
    method: Annotated[
        str, typer.Option(help="feddf, dense, coboosting, dafl or adi, with settings in brackets.")
    ] = "dense",
    data: Annotated[
        str | None,
        typer.Option(help="A YAML configuration, or a source such as digits or npz[path=x.npz]; labels only measure."),
    ] = None,
    set_: Annotated[
        list[str],
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the method, e.g. synthesis.num_epochs=50."),
    ] = [],  # noqa: B006
    seed: Annotated[int, typer.Option(help="Decides every random choice.")] = 0,
    threads: Annotated[int, typer.Option(min=1, help="Torch threads; their number changes bits.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Turn an ensemble or a fused net into one small model, and say how well it agrees with it."""
    from fedfuse.commands.distilling import print_distilled
    from fedfuse.distilling import distill

    with _live() as live:
        result = distill(
            artifact,
            student=student,
            method=method,
            data=data,
            out=out,
            overrides=set_,
            seed=seed,
            threads=threads,
            device=device,
            observer=live,
        )
    print_distilled(result)
    typer.echo(f"artifact: {result.folder / 'artifact'}")


@app.command("list")
def list_command(
    what: Annotated[
        str, typer.Argument(help="methods, partitions, models, sources, runtimes or rules; all if left out.")
    ] = "",
) -> None:
    """List what there is, with a line on each."""
    from fedfuse.core import registry
    from fedfuse.core.errors import did_you_mean

    kinds = {
        "methods": registry.METHODS,
        "partitions": registry.PARTITIONS,
        "models": registry.MODELS,
        "sources": registry.SOURCES,
        "runtimes": registry.RUNTIMES,
        "rules": registry.RULES,
    }
    if what and what not in kinds:
        raise ConfigError(f'there is no list of "{what}"', where="fedfuse list", fix=did_you_mean(what, kinds))
    for kind in [what] if what else kinds:
        if not what:
            typer.echo(f"{kind}:")
        names = kinds[kind].names()
        for name in names:
            typer.echo(f"{'' if what else '  '}{name:<{max(map(len, names)) + 2}}{kinds[kind].summary(name)}")
        for name, reason in kinds[kind].failed_entry_points.items():
            typer.echo(f"  {name}: its plug-in failed to import: {reason}", err=True)


@app.command("inspect")
def inspect_command(
    path: Annotated[Path, typer.Argument(help="A run, an artifact, a journal or a .safetensors file.")],
) -> None:
    """Say what a file or folder holds."""
    from fedfuse.commands.inspecting import describe

    typer.echo(describe(path))


@app.command("report")
def report_command(folder: Annotated[Path, typer.Argument(help="A run's or a comparison's folder.")]) -> None:
    """Draw the pictures and write report.html again."""
    from fedfuse.report import write_report

    typer.echo(f"report: {write_report(folder)}")


@app.command("export")
def export_command(
    artifact: Annotated[Path, typer.Argument(help="An artifact's or a run's folder.")],
    format_: Annotated[str, typer.Option("--format", help="onnx, safetensors or torch-export.")],
    out: Annotated[Path | None, typer.Option(help="The file to write; beside the artifact if left out.")] = None,
) -> None:
    """Write a fused model in a format that other software runs, and check that it gives the same numbers."""
    from fedfuse.commands.exporting import export

    typer.echo(f"wrote {export(artifact, format_, out)}")


@app.command("doctor")
def doctor_command() -> None:
    """Check this installation: versions, threads, devices, optional parts, and a small run."""
    from fedfuse.commands.doctor import examine

    healthy = True
    for finding in examine():
        healthy = healthy and finding.is_fine
        typer.echo(f"{'ok  ' if finding.is_fine else 'BAD '} {finding.what}: {finding.seen}")
    if not healthy:
        raise typer.Exit(1)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from fedfuse.core import VERSION

        typer.echo(VERSION)
        raise typer.Exit


@contextmanager
def _live() -> Iterator[Live]:
    from fedfuse.commands.live import Live

    with Live() as live:
        yield live


def main() -> None:
    """Run the command; a foreseen mistake ends in its message and exit code 2, Ctrl-C in 130."""
    from click.exceptions import Abort, ClickException

    code = 130
    try:
        # Typer turns Ctrl-C into this very code.
        code = app(standalone_mode=False) or 0
    except FedfuseError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (Abort, KeyboardInterrupt):
        pass
    if code == 130:
        typer.echo("interrupted; the same command continues", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
