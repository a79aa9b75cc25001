"""Uploads that look wrong: who, in which exchange, and why. Nobody is left out because of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from fedfuse.analysis.moves import measure_moves
from fedfuse.core.artifact import ModelSpec
from fedfuse.core.payload import Payload, Value, matches
from fedfuse.rules.reading import Upload

# All were chosen on honest runs of handwritten digits and a few attacks: docs/guides/robustness.md says what on.
_FEWEST_TO_COMPARE = 5
_TOO_LONG = 3.0
_TOO_LONG_SPREADS = 2.0
_SMALLEST_SPREAD = 0.1
_NOTHING = 0.05
_NOTHING_OF_STATISTICS = 1e-3
_OPPOSITE = -0.1
_AGREEMENT = 0.2
_NOISE = 1.5
_IN_COMMON = 4.0
_RISING_LOSS = 1.5
_FEWEST_COPIED = 64
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
# Curves, and numbers of which the n-th means something else at each client: honest ones have nothing in common.
_NOT_COMPARED = ("curve/*", "change/*", "projection/*", "seeds/*")


@dataclass(frozen=True)
class Suspect:
    """An upload that looks wrong.

    Args:
        client: client id.
        exchange: key of the exchange.
        reason: a few words on the upload, without a full stop.
        numbers: what the reason rests on.
    """

    client: str
    exchange: str
    reason: str
    numbers: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """As a table."""
        return {
            "client": self.client,
            "exchange": self.exchange,
            "reason": self.reason,
            "numbers": dict(self.numbers),
        }


@dataclass(frozen=True)
class _Screened:
    """One upload of an exchange.

    Args:
        client: who sent it.
        values: opened lazily.
        source: reads its tensors in parts.
        moves: keys of the floating-point tensors that are compared, those of which it is known where they began if
            there are such.
        starts: where they began, by key.
        num_examples: as the client claims; ``None`` if it does not say.
    """

    client: str
    values: Mapping[str, Value]
    source: Upload
    moves: tuple[str, ...]
    starts: Mapping[str, Tensor]
    num_examples: float | None

    @property
    def looks(self) -> tuple[Any, ...]:
        return (bool(self.starts), *((key, self.source.looks(key)) for key in self.moves))


class Screening:
    """Looks over the accepted uploads of a run, exchange by exchange.

    What looks wrong need not be: an honest client may be odd, and a careful attacker looks like everybody. So it only
    says what it sees, and is set not to cry wolf where clients hold very different data.

    Args:
        model_of: client id to the model that it owns; its first weights are where training starts.
    """

    def __init__(self, model_of: Callable[[str], ModelSpec]) -> None:
        self._model_of = model_of
        self._first: dict[str, tuple[dict[str, Tensor], frozenset[str]]] = {}
        self.suspects: list[Suspect] = []

    def look(
        self,
        exchange: str,
        sent: Mapping[str, Payload],
        uploads: Mapping[str, Mapping[str, Value]],
        digests: Mapping[str, str],
    ) -> list[Suspect]:
        """Look at the uploads of one exchange.

        Args:
            exchange: its key.
            sent: client id to what it was sent.
            uploads: client id to its upload, best opened lazily: only parts of tensors are read at a time.
            digests: client id to the digest of its upload.

        Returns:
            Those that look wrong, by client id; a client may be there for several reasons.
        """
        screened = [self._screened(client_id, uploads[client_id], sent[client_id]) for client_id in sorted(uploads)]
        found = [*_copies(screened, digests)]
        groups: dict[tuple[Any, ...], list[_Screened]] = defaultdict(list)
        for upload in screened:
            found += _oddities(upload)
            groups[upload.looks].append(upload)
        for group in groups.values():
            if len(group) >= _FEWEST_TO_COMPARE and group[0].moves:
                found += _compared(group)
        suspects = [Suspect(client, exchange, reason, numbers) for client, reason, numbers in found]
        suspects.sort(key=lambda suspect: suspect.client)
        self.suspects += suspects
        return suspects

    def _screened(self, client_id: str, values: Mapping[str, Value], sent: Payload) -> _Screened:
        source = Upload(values)
        first, buffers = self._first_weights(client_id) if any(k.startswith("model/") for k in values) else ({}, ())
        moves, starts = [], {}
        for key in values:
            looks, name = source.looks(key), key.partition("/")[2]
            if looks is None or not looks[1].is_floating_point or not all(looks[0]):
                continue
            if matches(key, _NOT_COMPARED):
                continue
            if name in buffers or key.rpartition(".")[2] in _STATISTICS:
                continue
            moves.append(key)
            start = sent.get(key, first.get(name) if key.startswith("model/") else None)
            if isinstance(start, Tensor) and tuple(start.shape) == looks[0]:
                starts[key] = start
        claimed = values.get("num_examples")
        is_number = isinstance(claimed, (int, float)) and not isinstance(claimed, bool) and claimed >= 1
        return _Screened(
            client_id,
            values,
            source,
            tuple(starts or moves),
            starts,
            float(claimed) if is_number else None,  # type: ignore[arg-type]
        )

    def _first_weights(self, client_id: str) -> tuple[dict[str, Tensor], frozenset[str]]:
        """First weights of the model that a client owns, and the names of its buffers."""
        spec = self._model_of(client_id)
        if spec.digest not in self._first:
            module = spec.build()
            names = frozenset(name for name, _ in module.named_buffers())
            self._first[spec.digest] = ({name: t.detach() for name, t in module.state_dict().items()}, names)
        return self._first[spec.digest]


Finding = tuple[str, str, dict[str, float]]
"""Client id, reason and numbers."""


def _copies(screened: Sequence[_Screened], digests: Mapping[str, str]) -> Iterator[Finding]:
    """Uploads that are equal; small ones may be so by chance."""
    same: dict[str, list[str]] = defaultdict(list)
    for upload in screened:
        sizes = [torch.Size(looks[0]).numel() for key in upload.moves if (looks := upload.source.looks(key))]
        if sum(sizes) >= _FEWEST_COPIED:
            same[digests[upload.client]].append(upload.client)
    for clients in same.values():
        for client_id in clients:
            others = [other for other in clients if other != client_id]
            if others:
                shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
                yield client_id, f"it is the same as that of {shown}, byte for byte", {"num_same": float(len(others))}


def _oddities(upload: _Screened) -> Iterator[Finding]:
    """What is odd in one upload by itself."""
    for key in upload.values:
        if key.rpartition(".")[2] == "running_var":
            value = upload.values[key]
            if isinstance(value, Tensor) and value.numel() and float(value.min()) < 0:
                yield upload.client, f'a running variance is below 0, in "{key}"', {"smallest": float(value.min())}
                break
    counts = upload.values.get("label_counts")
    if isinstance(counts, Tensor) and upload.num_examples is not None:
        total = float(counts.sum())
        if bool((counts < 0).any()):
            smallest = float(counts.min())
            yield upload.client, "it counts fewer than 0 examples of a class", {"smallest": smallest}
        elif total != upload.num_examples:
            reason = f"its label counts add up to {total:g}, and it claims {upload.num_examples:g} examples"
            yield upload.client, reason, {"label_counts": total, "num_examples": upload.num_examples}
    losses = upload.values.get("curve/train_loss")
    if isinstance(losses, Tensor) and losses.numel() > 1:
        first, last = float(losses.reshape(-1)[0]), float(losses.reshape(-1)[-1])
        if last > _RISING_LOSS * first > 0:
            reason = f"its training loss rose from {first:.2g} to {last:.2g}"
            yield upload.client, reason, {"first_loss": first, "last_loss": last}


def _compared(group: Sequence[_Screened]) -> Iterator[Finding]:
    """What is odd in one upload among those that look alike."""
    moves = measure_moves([upload.source for upload in group], [upload.starts for upload in group], group[0].moves)
    ratios, spreads = _against_usual(moves.norms)
    ratio_for_size, spread_for_size = ratios, spreads
    sizes = [upload.num_examples for upload in group]
    if None not in sizes:
        # More examples are more steps: a client is odd only if it is so for its size as well.
        expected = torch.tensor(sizes, dtype=torch.float64).sqrt()
        ratio_for_size, spread_for_size = _against_usual(moves.norms / expected)
    longest, shortest = torch.minimum(ratios, ratio_for_size), torch.maximum(ratios, ratio_for_size)
    spread = torch.minimum(spreads, spread_for_size)
    is_training = bool(group[0].starts)
    nothing = _NOTHING if is_training else _NOTHING_OF_STATISTICS
    for row, upload in enumerate(group):
        others = torch.arange(len(group)) != row
        agreement = float(moves.cosines[others].nanmedian())
        in_common = float(moves.affinities[others].nanmedian())
        cosine, affinity = float(moves.cosines[row]), float(moves.affinities[row])
        if float(shortest[row]) <= nothing:
            numbers = {"ratio": float(shortest[row])}
            yield upload.client, f"it is next to nothing: {numbers['ratio']:.2g} times what is usual here", numbers
            continue
        if is_training and float(longest[row]) >= _TOO_LONG and float(spread[row]) >= _TOO_LONG_SPREADS:
            numbers = {"ratio": float(longest[row]), "spreads": float(spread[row])}
            yield upload.client, f"it goes {numbers['ratio']:.2g} times as far as is usual here", numbers
        if affinity <= _NOISE and in_common >= _IN_COMMON:
            reason = "it has no more in common with the others than noise would"
            yield upload.client, reason, {"affinity": affinity, "usual_affinity": in_common}
        elif cosine <= _OPPOSITE and agreement >= _AGREEMENT:
            reason = f"it goes against the others: its cosine to them is {cosine:.2f}, theirs is {agreement:.2f}"
            yield upload.client, reason, {"cosine": cosine, "agreement": agreement}


def _against_usual(lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Each length over the median, and how many spreads that is: both on a logarithmic scale, and deaf to outliers."""
    logs = lengths.clamp(min=torch.finfo(torch.float64).tiny).log()
    distance = logs - logs.median()
    spread = max(1.4826 * float(distance.abs().median()), _SMALLEST_SPREAD)
    return distance.exp(), distance / spread
