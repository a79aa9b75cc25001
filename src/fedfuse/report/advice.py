"""Which method to choose under which constraints, read from what was measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from fedfuse.report.reading import Board, BoardRow
from fedfuse.report.units import format_bytes, format_seconds, in_words
from fedfuse.report.wording import NO_FEDERATION, UPPER_BOUND, base_name, method_title, score

SOURCE = "The advice is read from measured test accuracy on this data; it predicts nothing for other data."


@dataclass(frozen=True)
class Constraints:
    """What a federation can afford.

    Args:
        max_upload_bytes: most that one client may upload in all; ``None`` is no limit.
        is_heterogeneous: whether clients own models of different architectures.
        has_server_data: whether the server has data of its own; ``None`` where it could get some.
        budget_s: most seconds of computing, of all clients and the server together; ``None`` is no limit.
    """

    max_upload_bytes: float | None = None
    is_heterogeneous: bool = False
    has_server_data: bool | None = None
    budget_s: float | None = None

    def in_words(self) -> str:
        """The constraints in a few words.

        Example:
            >>> Constraints(max_upload_bytes=2048, has_server_data=False).in_words()
            'at most 2 KiB up per client, no data at the server'
        """
        parts = [
            f"at most {format_bytes(self.max_upload_bytes)} up per client" if self.max_upload_bytes is not None else "",
            "clients with different models" if self.is_heterogeneous else "",
            {None: "", True: "data at the server", False: "no data at the server"}[self.has_server_data],
            f"at most {format_seconds(self.budget_s)} of computing" if self.budget_s is not None else "",
        ]
        return ", ".join(part for part in parts if part) or "no limits"


def advise(board: Board, constraints: Constraints) -> list[str]:
    """Say which method to choose, and why: one line for each setting of a board.

    Args:
        board: what was measured.
        constraints: what can be afforded.

    Returns:
        A line for a comparison on one setting; one for each setting where settings were varied.
    """
    lines = []
    for varied, part in board.settings:
        line = _advice(part, constraints)
        lines.append(f"{in_words(varied)}: {line}" if varied else line)
    return lines


def typical_constraints(board: Board) -> list[Constraints]:
    """Three that many federations have: none; different models and no data at the server; the upload of one model.

    Args:
        board: what was measured; it says what one model's upload is.
    """
    one_model = [
        row.costs["upload_bytes"]
        for row in board.rows
        if row.costs.get("exchanges") == 1
        and _name(row) in {"local", "fedavg", "ensemble"}
        and "upload_bytes" in row.costs
    ]
    sizes = one_model or sorted(row.costs["upload_bytes"] for row in board.rows if "upload_bytes" in row.costs)
    limit = max(one_model) if one_model else (sizes[len(sizes) // 2] if sizes else None)
    return [
        Constraints(),
        Constraints(is_heterogeneous=True, has_server_data=False),
        replace(Constraints(has_server_data=False), max_upload_bytes=limit),
    ]


def _advice(board: Board, constraints: Constraints) -> str:
    excluded: dict[str, list[BoardRow]] = {}
    fitting = []
    for row in board.ranked:
        reason = _reason_against(row, constraints)
        if reason:
            excluded.setdefault(reason, []).append(row)
        else:
            fitting.append(row)
    left_out = "; ".join(
        f"{', '.join(method_title(row.method) for row in rows)} ({why})" for why, rows in excluded.items()
    )
    if not fitting:
        return f"No method that was measured fits: {left_out or 'the board is empty'}."
    best, others = fitting[0], fitting[1:]
    sentences = [f"Choose {method_title(best.method)}: {_measured(best)}."]
    if others:
        sentences.append(_against(best, others[0]))
    else:
        sentences.append("No other method that was measured fits.")
    alone = max((row.accuracy or 0.0 for row in board.rows if _name(row) in NO_FEDERATION), default=0.0)
    if alone >= (best.accuracy or 0.0):
        sentences.append(f"But a client alone reaches {score(alone)} on average.")
    if left_out:
        sentences.append(f"Left out: {left_out}.")
    return " ".join([*sentences, *_cautions(board, constraints)])


def _reason_against(row: BoardRow, constraints: Constraints) -> str:
    """Why a method cannot be chosen; empty if it can."""
    limits: Sequence[tuple[str, float | None, float | None, Callable[[float | None], str]]] = (
        ("uploads more than", row.costs.get("upload_bytes"), constraints.max_upload_bytes, format_bytes),
        ("computes longer than", _seconds(row), constraints.budget_s, format_seconds),
    )
    if _name(row) in UPPER_BOUND:
        return "uploads the raw data"
    if _name(row) in NO_FEDERATION:
        return "gives no common model"
    if row.accuracy is None:
        return "has no test accuracy"
    if constraints.is_heterogeneous and row.takes_heterogeneous is not True:
        known = row.takes_heterogeneous is False
        return "needs one architecture" if known else "not known whether it takes clients with different models"
    if constraints.has_server_data is False and row.needs_server_data is not False:
        return "needs data at the server" if row.needs_server_data else "not known whether it needs data at the server"
    if constraints.has_server_data is False and row.used_server_data:
        return "was measured with data at the server"
    for what, value, limit, written in limits:
        if limit is not None and value is None:
            return f"not known whether it {what} {written(limit)}"
        if limit is not None and value is not None and value > limit:
            return f"{what} {written(limit)}"
    return ""


def _measured(row: BoardRow) -> str:
    seeds = f" over {row.num_seeds} seeds" if row.num_seeds > 1 else " with one seed"
    facts = [f"{score(row.accuracy, row.spread if row.num_seeds > 1 else None)} test accuracy{seeds}"]
    if "upload_bytes" in row.costs:
        facts.append(f"{format_bytes(row.costs['upload_bytes'])} up per client")
    if _seconds(row) is not None:
        facts.append(f"{format_seconds(_seconds(row))} of computing")
    return ", ".join(facts)


def _against(best: BoardRow, other: BoardRow) -> str:
    """The runner-up: level with the best where the gap is no larger than the spread over seeds."""
    gap = (best.accuracy or 0.0) - (other.accuracy or 0.0)
    name, points = method_title(other.method), f"{100 * gap:.1f} points"
    if best.num_seeds < 2 or other.num_seeds < 2:
        return f"{name} is {points} behind; one seed says nothing about the spread."
    if gap > max(best.spread, other.spread):
        return f"Next is {name}, {points} behind."
    return f"{name} is level within one spread: {_measured(other)}."


def _cautions(board: Board, constraints: Constraints) -> list[str]:
    found = []
    if any(row.num_seeds < len(board.seeds) for row in board.rows):
        found.append("The comparison is not finished: some seeds are missing.")
    data, model = board.config.get("data"), board.config.get("model")
    had_server_data = isinstance(data, Mapping) and bool(data.get("server"))
    if constraints.has_server_data and not had_server_data:
        found.append("This was measured without data at the server.")
    if constraints.is_heterogeneous and not (isinstance(model, Mapping) and model.get("clients")):
        found.append("This was measured with one architecture for all clients.")
    return found


def _name(row: BoardRow) -> str:
    return row.name or base_name(row.method)


def _seconds(row: BoardRow) -> float | None:
    clocks = [row.costs[clock] for clock in ("client_seconds", "server_seconds") if clock in row.costs]
    return sum(clocks) if len(clocks) == 2 else None
