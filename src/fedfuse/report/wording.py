"""What a result says in plain words."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from fedfuse.report.reading import Board, BoardRow, Run
from fedfuse.report.suspects import suspect_sentences
from fedfuse.report.units import DASH, format_bytes, format_count, format_percent

UPPER_BOUND = frozenset({"centralized"})
NO_FEDERATION = frozenset({"local"})
# How papers spell their names; any other label is shown as it was given.
_SPELLING = {
    "adi": "ADI",
    "afl": "AFL",
    "ccvr": "CCVR",
    "centralized": "Centralized",
    "co_boosting": "Co-Boosting",
    "coboosting": "Co-Boosting",
    "dafl": "DAFL",
    "dense": "DENSE",
    "ensemble": "Ensemble",
    "fafi": "FAFI",
    "feature_ensemble": "Feature ensemble",
    "fed_sb": "Fed-SB",
    "fedadam": "FedAdam",
    "fedavg": "FedAvg",
    "fedcvae": "FedCVAE",
    "feddf": "FedDF",
    "feddyn": "FedDyn",
    "fedex_lora": "FedEx-LoRA",
    "fedfisher": "FedFisher",
    "fedhm": "FedHM",
    "fedit": "FedIT",
    "fedma": "FedMA",
    "fednova": "FedNova",
    "fedpft": "FedPFT",
    "fedprox": "FedProx",
    "fedsd2c": "FedSD2C",
    "fens": "FENS",
    "ffa_lora": "FFA-LoRA",
    "flexlora": "FlexLoRA",
    "flora": "FLoRA",
    "fusefl": "FuseFL",
    "greedy_soup": "Greedy soup",
    "heterofl": "HeteroFL",
    "heterotune": "HeteroTune",
    "intactofl": "IntactOFL",
    "lda": "LDA",
    "linear_weights": "Linear weights",
    "local": "Local",
    "merge": "Merge",
    "otfusion": "OTFusion",
    "pfedlora": "pFedLoRA",
    "prototypes": "Prototypes",
    "regmean": "RegMean",
    "scaffold": "SCAFFOLD",
    "size_groups": "Size groups",
    "smallest": "Smallest",
    "voting": "Voting",
}


def base_name(label: str) -> str:
    """The method's name at the start of a label.

    Args:
        label: such as ``fusefl[num_blocks=2]``.

    Example:
        >>> base_name("fusefl[num_blocks=2]")
        'fusefl'
    """
    return "".join(takewhile(lambda letter: letter.isalnum() or letter in "_-", label))


def method_title(label: str) -> str:
    """A label with the method's name spelt as in its paper.

    Args:
        label: such as ``fusefl[num_blocks=2]``.

    Example:
        >>> method_title("fusefl[num_blocks=2]"), method_title("my own")
        ('FuseFL[num_blocks=2]', 'my own')
    """
    name = base_name(label)
    return _SPELLING.get(name, name) + label[len(name) :]


def leader(rows: Sequence[BoardRow]) -> BoardRow | None:
    """The most accurate method; training on pooled data is what all are measured against, so it leads only alone.

    Args:
        rows: of a board, in any order; of equals the first leads.
    """
    scored = [row for row in rows if row.accuracy is not None]
    competing = [row for row in scored if base_name(row.method) not in UPPER_BOUND] or scored
    return max(competing, key=lambda row: row.accuracy or 0.0, default=None)


def score(accuracy: float | None, spread: float | None = None) -> str:
    """An accuracy in per cent, with its spread where there is one.

    Args:
        accuracy: in [0, 1]; ``None`` where nobody knows.
        spread: standard deviation over seeds; ``None`` for one seed.

    Example:
        >>> score(0.9412), score(0.9412, 0.004)
        ('94.1 %', '94.1 ± 0.4 %')
    """
    if accuracy is None:
        return DASH
    return format_percent(accuracy) if spread is None else f"{100 * accuracy:.1f} ± {100 * spread:.1f} %"


_SHARES = ("exact_match", "rouge", "recognised")


def metric_name(name: str) -> str:
    """What a further score is called in tables.

    Args:
        name: in ``result.json``.

    Example:
        >>> metric_name("exact_match")
        'exact match'
    """
    return name.replace("_", " ")


def metric(name: str, value: float | None, spread: float | None = None) -> str:
    """A further score: shares in per cent, others as they are.

    Args:
        name: in ``result.json``.
        value: ``None`` where nobody knows.
        spread: standard deviation over seeds; ``None`` for one seed.

    Example:
        >>> metric("exact_match", 0.5), metric("perplexity", 12.3456, 0.1)
        ('50.0 %', '12.35 ± 0.10')
    """
    if value is None:
        return DASH
    if name.startswith(_SHARES):
        return score(value, spread)
    return f"{value:.2f}" if spread is None else f"{value:.2f} ± {spread:.2f}"


def metric_cell(name: str, row: BoardRow) -> str:
    """A row's cell of a further score.

    Args:
        name: of the score.
        row: of a board.
    """
    return metric(name, row.metrics.get(name), row.metric_spreads.get(name) if row.num_seeds > 1 else None)


def privacy_lines(run: Run) -> list[str]:
    """What was guaranteed of the uploads' privacy and what not, as sentences; none where it was not asked for.

    Args:
        run: the run.
    """
    lines = run.privacy.get("lines")
    return [str(line) for line in lines] if isinstance(lines, list) else []


def privacy_facts(run: Run) -> list[tuple[str, str]]:
    """The numbers behind the words.

    Args:
        run: the run.
    """
    names = {
        "mechanism": "mechanism",
        "epsilon": "epsilon",
        "delta": "delta",
        "noise_multiplier": "noise multiplier",
        "clip_norm": "clip norm",
        "num_releases": "releases of each client",
        "noise": "the noise comes from",
    }
    words = {"seeded": "the run's seed", "secret": "a secret"}
    shown = [(name, run.privacy.get(key)) for key, name in names.items()]
    return [
        (name, f"{value:.6g}" if isinstance(value, float) else words.get(str(value), str(value)))
        for name, value in shown
        if value is not None
    ]


def run_headline(run: Run) -> list[str]:
    """The result of a run in plain words.

    Args:
        run: the run.

    Returns:
        Sentences, the one that matters most first.
    """
    title, cost = method_title(run.method), _cost(run.costs.get("upload_bytes"), run.costs.get("exchanges"))
    if run.accuracy is None:
        number = format_count(len(run.clients))
        sentences = [f"{title} ran with {number} client{'' if len(run.clients) == 1 else 's'}{cost}."]
        sentences.append(
            "There is no test accuracy: the data has no test part, or nothing came out that could be scored."
        )
    elif run.personal:
        average = format_percent(run.accuracy)
        sentences = [f"{title}: the clients' own models reach {average} on average on the test set{cost}."]
    else:
        sentences = [f"{title} reaches {format_percent(run.accuracy)} on the test set{cost}."]
    known = len({client.name for client in run.clients} | set(run.missing))
    if run.missing:
        sentences.append(f"{len(run.missing)} of {known} clients gave no answer.")
    return [*sentences, *suspect_sentences(run.suspects)]


def board_headline(board: Board) -> list[str]:
    """The result of a comparison in plain words.

    Args:
        board: the comparison.

    Returns:
        Sentences, the one that matters most first.
    """
    if not board.rows:
        return ["The comparison holds no method yet."]
    scored = [row for row in board.ranked if row.accuracy is not None]
    if not scored:
        number = "One method" if len(board.rows) == 1 else f"{len(board.rows)} methods"
        return [f"{number} ran without a test set, so there is no accuracy to compare.", "The costs are below."]
    best = leader(scored) or scored[0]
    others = [row for row in scored if row is not best and base_name(row.method) not in UPPER_BOUND | NO_FEDERATION]
    if base_name(best.method) in NO_FEDERATION and others:
        alone = f"a client alone reaches {_spread_score(best)} on average{_difference(best, others[:1])}"
        sentences = [f"No method beats training without federation: {alone}."]
    else:
        cost = _cost(best.costs.get("upload_bytes"), best.costs.get("exchanges"))
        sentences = [f"{method_title(best.method)} reaches {_spread_score(best)}{_difference(best, others)}{cost}."]
    if others and best.num_seeds > 1 and _within_spread(best, others[0]):
        sentences.append(f"The lead over {method_title(others[0].method)} is within the spread of the seeds.")
    for row in scored:
        if row is not best and base_name(row.method) in NO_FEDERATION:
            sentences.append(f"A client alone reaches {format_percent(row.accuracy)} on average.")
        if row is not best and base_name(row.method) in UPPER_BOUND:
            sentences.append(f"Training on all data in one place reaches {format_percent(row.accuracy)}.")
    return sentences


def _difference(best: BoardRow, others: Sequence[BoardRow]) -> str:
    """How far the best is above one-shot averaging, which readers know, or else above the runner-up."""
    averaged = [row for row in others if base_name(row.method) == "fedavg" and row.costs.get("exchanges") == 1]
    other = next(iter([*averaged, *others]), None)
    if other is None or best.accuracy is None or other.accuracy is None:
        return ""
    points = 100 * (best.accuracy - other.accuracy)
    name = ("one-shot " if other in averaged else "") + method_title(other.method)
    if points < 0.05:
        return f", level with {name}"
    return f", {points:.0f} points above {name}" if points >= 9.95 else f", {points:.1f} points above {name}"


def _spread_score(row: BoardRow) -> str:
    if row.num_seeds > 1:
        return f"{format_percent(row.accuracy)} (± {100 * row.spread:.1f} over {row.num_seeds} seeds)"
    return format_percent(row.accuracy)


def _within_spread(best: BoardRow, other: BoardRow) -> bool:
    return (best.accuracy or 0.0) - best.spread <= (other.accuracy or 0.0) + other.spread


def _cost(upload_bytes: float | None, exchanges: float | None) -> str:
    if upload_bytes is None:
        return ""
    text = f", with {format_bytes(upload_bytes)} uploaded per client"
    if exchanges is None:
        return text
    return text + (" in one exchange" if exchanges == 1 else f" in {format_count(exchanges)} exchanges")
