"""The command ``fedfuse``: thin. Everything heavy is imported inside the command that needs it."""

from __future__ import annotations

import errno
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


@app.command("diagnose")
def diagnose_command(
    config: Annotated[
        Path, typer.Argument(help="A YAML configuration, or the folder of a finished run of one_round_probe.")
    ],
    rounds: Annotated[int, typer.Option(min=2, help="What one round is held against, at equal local work.")] = 10,
    measure: Annotated[
        bool, typer.Option("--measure", help="Run one round and many too, and compare them on the test set.")
    ] = False,
    seeds: Annotated[int, typer.Option(min=1, help="How many seeds, counted from the configuration's.")] = 1,
    set_: SetOption = [],  # noqa: B006
    vary: Annotated[
        list[str],
        typer.Option(metavar="KEY=VALUE,VALUE", help="Everything with each value, e.g. model.width=4,8,16."),
    ] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="The folder; the same command continues there.")] = None,
) -> None:
    """Say beforehand whether one round of averaging is enough, and why."""
    from fedfuse.commands.diagnosing import diagnose_and_tell, print_diagnosis

    with _live() as live:
        table, page = diagnose_and_tell(
            config, set_, num_rounds=rounds, measure=measure, vary=vary, seeds=seeds, out=out, observer=live
        )
    print_diagnosis(table)
    typer.echo(f"report: {page}")


@app.command("split")
def split_command(
    config: ConfigArgument,
    out: Annotated[Path, typer.Option(help="The folder for the files.")],
    set_: SetOption = [],  # noqa: B006
) -> None:
    """Write a simulation's clients as one file each, to try a real federation with them."""
    from fedfuse import experiment
    from fedfuse.commands.splitting import split

    for path in split(experiment.read_config(config, set_), out):
        typer.echo(f"wrote {path}")


@app.command("contribute")
def contribute_command(
    name: Annotated[str, typer.Option(help="The client's name.")],
    out: Annotated[str, typer.Option(help="The file to write, for instance hospital-a.fed; a path or a URL.")],
    config: Annotated[
        Path | None, typer.Argument(help="The federation's YAML configuration; may be left out with --request.")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="The client's data; its part of the configuration's partition if left out.")
    ] = None,
    source: Annotated[str, typer.Option(help="How to read the data; told by the file's name if left out.")] = "",
    set_: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="A setting of that source, e.g. y_key=labels.")
    ] = [],  # noqa: B006
    request: Annotated[
        str | None, typer.Option(help="The server's request, a path or a URL; the first question if left out.")
    ] = None,
    home: Annotated[
        Path | None, typer.Option(help="Folder of what the client keeps; ~/.fedfuse/NAME if left out.")
    ] = None,
    key: Annotated[Path | None, typer.Option(help="The client's signing key; made in its home if left out.")] = None,
    server_key: Annotated[str, typer.Option(help="Public key that a request must bear.")] = "",
    preview: Annotated[bool, typer.Option("--preview", help="Show what would leave, and ask before writing.")] = False,
    refuse: Annotated[
        list[str], typer.Option(metavar="KEYS", help="Keys that must not leave, e.g. 'moments/*'; may be repeated.")
    ] = [],  # noqa: B006
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Answer a federation's question on one's own data, into one signed file that can be carried by hand."""
    from fedfuse.commands.byhand import contribute_and_tell

    contribute_and_tell(
        config,
        name,
        data,
        out=out,
        source=source,
        settings=set_,
        request=request,
        home=home,
        key=key,
        server_key=server_key,
        preview=preview,
        refuse=refuse,
        device=device,
    )


@app.command("fuse")
def fuse_command(
    paths: Annotated[
        list[str],
        typer.Argument(
            help="Adapters of PEFT, checkpoints or artifacts; with --config folders, URLs or files of contributions."
        ),
    ] = [],  # noqa: B006
    config: Annotated[
        Path | None, typer.Option(help="A federation's YAML configuration: fuse contributions that came as files.")
    ] = None,
    method: Annotated[
        str,
        typer.Option(help="A rule such as flora, svd, average, fedex or ties; with --config a method; with settings."),
    ] = "",
    weights: Annotated[
        str, typer.Option("--weights", "--weight", help="One per path: 0.5,0.3,0.2; equal if left out.")
    ] = "",
    rank: Annotated[int | None, typer.Option(help="Of a fused adapter, for rules that choose one.")] = None,
    base: Annotated[
        str | None, typer.Option(help="The base model, or the checkpoint that all began with, for rules that need it.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Show what every rule would make of the adapters.")
    ] = False,
    set_: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="A setting of the rule or of the configuration.")
    ] = [],  # noqa: B006
    out: Annotated[Path | None, typer.Option(help="Where the result comes; with --config the run's folder.")] = None,
    into: Annotated[
        Path | None, typer.Option(help="A growing folder that adapters join as they come, in any order.")
    ] = None,
    name: Annotated[str, typer.Option(help="What --into is to call the adapter; its folder's name if left out.")] = "",
    drop: Annotated[list[str], typer.Option(metavar="NAME", help="An adapter that leaves --into.")] = [],  # noqa: B006
) -> None:
    """Fuse adapters and models that people already have, or with --config contributions that came as files."""
    if into is not None:
        if config is not None or out is not None or base is not None or compare:
            raise ConfigError(
                "a growing folder is its own result, of adapters alone",
                where="--config, --out, --base, --compare",
                fix="leave them out, or --into",
            )
        from fedfuse.commands.growing import grow_and_tell

        grow_and_tell(paths, into, name=name, drop=drop, method=method, weights=weights, rank=rank, settings=set_)
        return
    if name or drop:
        raise ConfigError("only a growing folder calls adapters by names", where="--name, --drop", fix="give --into")
    if not paths:
        raise ConfigError("there is nothing to fuse", where="fedfuse fuse", fix="name what is to be fused")
    if config is None:
        from fedfuse.commands.fusing_files import fuse_and_tell as fuse_files_and_tell

        fuse_files_and_tell(
            paths, method=method, weights=weights, rank=rank, base=base, settings=set_, out=out, compares=compare
        )
        return
    if weights or rank is not None or base is not None or compare:
        raise ConfigError(
            "these options are for files without a configuration",
            where="--weights, --rank, --base, --compare",
            fix="leave them out, or --config",
        )
    from fedfuse.commands.byhand import fuse_and_tell

    if not fuse_and_tell(paths, config, set_, out, method=method):
        raise typer.Exit(3)


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


@app.command("certs")
def certs_command(
    folder: Annotated[Path, typer.Argument(help="Where certificates and keys come; what is there stays.")],
    clients: Annotated[str, typer.Option(help="Names of new clients: hospital-a,hospital-b.")] = "",
    host: Annotated[
        list[str], typer.Option(metavar="HOST", help="A name or address that clients reach the server by.")
    ] = [],  # noqa: B006
    days: Annotated[int, typer.Option(min=1, help="How long certificates hold.")] = 365,
) -> None:
    """Make certificates and keys for a federation, and say what to hand to whom."""
    from fedfuse.commands.certs import make

    names = [name.strip() for name in clients.split(",") if name.strip()]
    typer.echo(make(folder, names, host, valid_days=days))


@app.command("serve")
def serve_command(
    config: ConfigArgument,
    address: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where to listen, e.g. 0.0.0.0:9092.")],
    out: Annotated[Path, typer.Option(help="The run's folder; the same command continues there.")],
    certs: Annotated[Path | None, typer.Option(help="What fedfuse certs made.")] = None,
    quorum: Annotated[
        float | None, typer.Option(min=0, max=1, help="Fraction of the clients that must answer.")
    ] = None,
    deadline: Annotated[
        str, typer.Option(metavar="2d", help="Longest wait for clients in each exchange: 90s, 30m, 12h, 2d.")
    ] = "",
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS, no keys: for trials on one machine.")] = False,
    set_: SetOption = [],  # noqa: B006
) -> None:
    """Serve a real federation until its model is there; after any interruption the same command continues."""
    from fedfuse.commands.serving import prepare, serve
    from fedfuse.commands.serving_screen import ServingLive

    serving = prepare(
        config, set_, address=address, certs=certs, out=out, quorum=quorum, deadline=deadline, insecure=insecure
    )
    if insecure:
        typer.echo("INSECURE: no TLS and no keys. Whoever reaches this port can read, join and answer.", err=True)
    live = ServingLive(out)
    with live:
        result = serve(serving, live)
    from fedfuse.report import print_result, write_report

    print_result(result.facts)
    typer.echo(f"report: {write_report(out)}")


@app.command("join")
def join_command(
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="The server's address.")],
    name: Annotated[str, typer.Option(help="This client's name in the federation.")],
    data: Annotated[Path, typer.Option(help="File or folder of its examples; they stay here.")],
    source: Annotated[str, typer.Option(help="How to read the data; told by the file's name if left out.")] = "",
    set_: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="A setting of that source, e.g. y_key=labels.")
    ] = [],  # noqa: B006
    ca: Annotated[Path | None, typer.Option(help="The ca.pem that the server's operator gave.")] = None,
    key: Annotated[Path | None, typer.Option(help="This client's .key; its signing key lies beside it.")] = None,
    home: Annotated[Path | None, typer.Option(help="For what must last; ~/.fedfuse/NAME if left out.")] = None,
    preview: Annotated[bool, typer.Option("--preview", help="Show what would leave, and ask first.")] = False,
    yes: Annotated[bool, typer.Option("--yes", help="With --preview: show, and do not ask.")] = False,
    refuse: Annotated[list[str], typer.Option(metavar="KEY", help="What must not leave: a key, or 'moments/*'.")] = [],  # noqa: B006
    only_sums: Annotated[
        bool, typer.Option("--only-sums", help="Send masked uploads only, whose sum the server learns and no more.")
    ] = False,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    insecure: Annotated[bool, typer.Option("--insecure", help="No TLS, no key: for trials on one machine.")] = False,
) -> None:
    """Take part in a real federation until it is over; after any interruption the same command comes back."""
    from fedfuse.commands.consent import TerminalOwner
    from fedfuse.commands.joining import Joining, join

    owner = TerminalOwner(previews=preview, says_yes=yes)
    if insecure:
        typer.echo("INSECURE: no TLS and no key. Whoever is in between can read and change what is sent.", err=True)
    joining = Joining(
        server=server,
        name=name,
        data=data,
        source=source,
        settings=set_,
        ca=ca,
        key=key,
        home=home,
        refuse=refuse,
        previews=preview,
        only_sums=only_sums,
        insecure=insecure,
        device=device,
    )
    owner.say(join(joining, owner))


@app.command("status")
def status_command(
    run: Annotated[Path, typer.Argument(help="The --out folder of fedfuse serve.")],
    watch: Annotated[
        bool, typer.Option("--watch", help="Draw it again every two seconds until the run is done.")
    ] = False,
) -> None:
    """Say who takes part in a federation, what each has sent and when, and who is awaited."""
    from fedfuse.commands.status import show

    show(run, watches=watch)


@app.command("flower-app")
def flower_app_command(
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
) -> None:
    """Write a Flower app folder, for those who run Flower already: flwr run FOLDER."""
    from fedfuse.runtimes.flower.app_folder import write_app_folder

    for path in write_app_folder(folder):
        typer.echo(f"wrote {path}")


@app.command("list")
def list_command(
    what: Annotated[
        str,
        typer.Argument(
            help="methods, partitions, models, sources, runtimes, rules, adapter-rules, attacks or codecs; all if "
            "left out."
        ),
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
        "adapter-rules": registry.ADAPTER_RULES,
        "attacks": registry.ATTACKS,
        "codecs": registry.CODECS,
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
    path: Annotated[
        Path, typer.Argument(help="A run, an artifact, an adapter, a journal, a .safetensors or a .fed file.")
    ],
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
    format_: Annotated[
        str,
        typer.Option(
            "--format", help="onnx, safetensors, torch-export; of foundation models peft, transformers, diffusers."
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(help="The file or folder to write; beside the artifact if left out.")
    ] = None,
) -> None:
    """Write a fused model in a format that other software runs, and check that it gives the same numbers."""
    from fedfuse.commands.exporting import export

    typer.echo(f"wrote {export(artifact, format_, out)}")


@app.command("evaluate")
def evaluate_command(
    artifact: Annotated[Path, typer.Argument(help="An artifact's or a run's folder.")],
    data: Annotated[str, typer.Option(help="Data to evaluate on: a file, a folder or a hub id.")] = "",
    source: Annotated[str, typer.Option(help="How to read the data; told by the artifact if left out.")] = "",
    set_: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="A setting of that source, e.g. max_length=64.")
    ] = [],  # noqa: B006
    answers: Annotated[
        int | None, typer.Option(min=0, help="Prompts whose answers a language model writes, for ROUGE.")
    ] = None,
    lm_eval: Annotated[str, typer.Option("--lm-eval", help="Tasks of the lm-eval harness: arc_easy,piqa.")] = "",
    task_folder: Annotated[Path | None, typer.Option(help="Folder of further tasks for --lm-eval.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First examples only.")] = None,
    out: Annotated[Path | None, typer.Option(help="JSON file for the scores.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Score an artifact on data, or at tasks of the lm-eval harness."""
    from fedfuse.commands.evaluating import evaluate_artifact, tell

    found = evaluate_artifact(
        artifact,
        data,
        source=source,
        settings=set_,
        num_answers=answers,
        tasks=[task for task in lm_eval.split(",") if task],
        task_folder=task_folder,
        limit=limit,
        device=device,
    )
    tell(found, out)


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
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f"\n  where: {error.filename}" if error.filename else ""
        fix = "free disk space or name another folder, then run the same command again"
        typer.echo(f"error: cannot write: {error.strerror}{where}\n  fix:   {fix}", err=True)
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
