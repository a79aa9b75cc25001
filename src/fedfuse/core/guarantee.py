"""The server's side of differential privacy: what clients are told, the noise of the mean, and the account."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError, UploadRefused
from fedfuse.core.gaussian import gaussian_epsilon
from fedfuse.core.journal import Entry
from fedfuse.core.noise import Noise
from fedfuse.core.payload import Payload, Value, matches
from fedfuse.core.release import SPENT, Privacy, with_noise
from fedfuse.core.seeding import Rng

_NEIGHBOURS = {
    "local": "one client's upload against none",
    "central": "one client added or removed; how many answered is known",
    "trained": "one training example of a client added or removed",
}


class Releases:
    """Keeps the account of what left the clients of one run, and makes the noise of the mean.

    Args:
        privacy: the operator's settings; ``None`` releases everything as it is.
        rng: the server's source; its secret, where there is one, makes the noise of the mean.
        is_secret: whether the noise comes from secrets; for the guarantee's words.
        training_delta: delta of one exchange that trains by DP-SGD.
    """

    def __init__(
        self,
        privacy: Privacy | None = None,
        rng: Rng | None = None,
        *,
        is_secret: bool = False,
        training_delta: float = 1e-5,
    ) -> None:
        self.privacy, self._rng = privacy, rng or Rng(0)
        self._is_secret, self._training_delta = is_secret, training_delta
        self._exchanges: list[str] = []
        self._left: dict[str, set[str]] = {}  # by what became of it
        self._spent: dict[str, dict[str, float]] = {}

    def terms(self) -> dict[str, Any]:
        """What clients are told with every question; empty where nothing is to be done."""
        return self.privacy.terms() if self.privacy else {}

    def begin(self, exchange: str) -> None:
        """Count one more exchange, before any client is asked.

        Args:
            exchange: its key.

        Raises:
            ConfigError: the noise was made for fewer.
        """
        privacy = self.privacy
        if privacy is not None and privacy.epsilon is not None and len(self._exchanges) >= privacy.num_releases:
            raise ConfigError(
                f'the exchange "{exchange}" would be release {len(self._exchanges) + 1} of each client, but the noise '
                f"for epsilon {privacy.epsilon:g} was made for {privacy.num_releases}",
                where="privacy.num_releases",
                fix="give the number of exchanges of the method",
            )
        self._exchanges.append(exchange)

    def note(self, exchange: str, client_id: str, upload: Mapping[str, Value]) -> None:
        """Take down what an accepted upload holds.

        Args:
            exchange: its key.
            client_id: who sent it.
            upload: opened lazily; only what a client spent is read.
        """
        for key in upload:
            if key != SPENT:
                self._left.setdefault(self._kind(key), set()).add(_group(key))
        if SPENT in upload:
            spent = upload[SPENT]
            value = float(spent.reshape(-1)[-1]) if isinstance(spent, Tensor) and spent.numel() else math.inf
            self._spent.setdefault(client_id, {})[exchange] = value

    def seen_by_method(self, exchange: str, entries: Mapping[str, Entry]) -> dict[str, Entry]:
        """The replies that the method gets: under ``central`` each is the same noisy mean of all.

        The method then computes from one noisy mean alone, so whatever it makes keeps the guarantee.

        Args:
            exchange: its key.
            entries: the accepted uploads by client id.
        """
        privacy = self.privacy
        if privacy is None or privacy.mechanism != "central" or not entries:
            return dict(entries)
        ordered = [entries[client_id] for client_id in sorted(entries)]
        facts = hashlib.sha256("".join(str(entry.facts["sha256"]) for entry in ordered).encode()).hexdigest()
        noise = Noise(self._rng.private_key("central", exchange, facts, repr(privacy.multiplier)))
        std = privacy.multiplier * (privacy.clip_norm or 0.0) / len(ordered)
        data = Payload(dict(_noisy_mean(ordered, noise, std, privacy.constants))).encode()
        return {client_id: Entry(entry.key, entry.facts, data=data) for client_id, entry in entries.items()}

    @property
    def hides_single_uploads(self) -> bool:
        """Whether the method sees a mean in place of every upload."""
        return self.privacy is not None and self.privacy.mechanism == "central"

    def own_part(self, upload: Mapping[str, Value]) -> Mapping[str, Value]:
        """What an upload says of its client: everything but what was replaced by a constant.

        Args:
            upload: opened lazily, and so is the result.
        """
        constants = self.privacy.constants if self.privacy else {}
        return _Without(upload, constants) if constants else upload

    def guarantee(self) -> dict[str, Any] | None:
        """What was guaranteed in this run and what not, as JSON; nothing where no privacy was asked for."""
        if self.privacy is None and not self._spent:
            return None
        if self.privacy is None or self.privacy.mechanism == "trained":
            facts = self._trained()
        else:
            facts = self._noised(self.privacy)
        facts["exchanges"] = list(self._exchanges)
        for kind in ("covers", "public", "constants", "uncovered"):
            facts[kind] = sorted(self._left.get(kind, ()))
        facts["holds"] = math.isfinite(facts["epsilon"]) and not facts["uncovered"]
        facts["epsilon"] = facts["epsilon"] if math.isfinite(facts["epsilon"]) else None
        facts["lines"] = _in_words(facts)
        return facts

    def _noised(self, privacy: Privacy) -> dict[str, Any]:
        num, sigma = len(self._exchanges), privacy.multiplier
        replaced = gaussian_epsilon(sigma / 2, privacy.delta, num)
        return {
            "mechanism": privacy.mechanism,
            "neighbours": _NEIGHBOURS[privacy.mechanism],
            "epsilon": gaussian_epsilon(sigma, privacy.delta, num),
            "epsilon_if_replaced": replaced if math.isfinite(replaced) else None,
            "delta": privacy.delta,
            "noise_multiplier": sigma,
            "clip_norm": privacy.clip_norm,
            "num_releases": num,
            "noise": "secret" if self._is_secret else "seeded",
        }

    def _trained(self) -> dict[str, Any]:
        per_client = {client_id: sum(spent.values()) for client_id, spent in sorted(self._spent.items())}
        num = max((len(spent) for spent in self._spent.values()), default=0)
        return {
            "mechanism": "trained",
            "neighbours": _NEIGHBOURS["trained"],
            "epsilon": max(per_client.values(), default=math.inf),
            "epsilon_by_client": per_client,
            "delta": num * self._training_delta,
            "num_releases": num,
            "noise": "secret" if self._is_secret else "seeded",
        }

    def _kind(self, key: str) -> str:
        if self.privacy is None:
            return "covers" if matches(key, ("model/*",)) else "uncovered"
        if matches(key, self.privacy.constants):
            return "constants"
        return "public" if matches(key, self.privacy.public) else "covers"


class _Without(Mapping[str, Value]):
    """A mapping without the keys of some patterns."""

    def __init__(self, whole: Mapping[str, Value], patterns: Iterable[str]) -> None:
        self._whole, self._patterns = whole, tuple(patterns)

    def __getitem__(self, key: str) -> Value:
        if matches(key, self._patterns):
            raise KeyError(key)
        return self._whole[key]

    def __iter__(self) -> Iterator[str]:
        return (key for key in self._whole if not matches(key, self._patterns))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _group(key: str) -> str:
    return f"{key.split('/', 1)[0]}/*" if "/" in key else key


def _noisy_mean(
    entries: list[Entry], noise: Noise, std: float, constants: Iterable[str]
) -> Iterator[tuple[str, Value]]:
    """The mean of every floating-point tensor with its noise, one after another; what is constant stays."""
    uploads = [entry.open() for entry in entries]
    for key, first in uploads[0].items():
        if matches(key, constants) or not (isinstance(first, Tensor) and first.is_floating_point()):
            yield key, first
            continue
        total = torch.zeros(first.shape, dtype=torch.float64)
        for upload in uploads:
            other = upload.get(key)
            if not isinstance(other, Tensor) or other.shape != first.shape:
                raise UploadRefused(
                    f'uploads that differ in "{key}" have no mean',
                    where="privacy.mechanism",
                    fix="use mechanism: local, or one model for all clients",
                )
            total += other.double()
        mean = total / len(uploads)
        yield key, (with_noise(key, mean, std, noise) if std else mean).to(first.dtype)


def _in_words(facts: Mapping[str, Any]) -> list[str]:
    """The guarantee as sentences, the one that matters most first."""
    covers = ", ".join(facts["covers"]) or "nothing"
    lines = []
    if facts["epsilon"] is None:
        lines.append("No guarantee: nothing that was added could hide anything.")
    elif facts["uncovered"]:
        lines.append(
            f"No guarantee for the uploads as a whole: {', '.join(facts['uncovered'])} left without noise. "
            f"For {covers} alone it is epsilon {facts['epsilon']:.2f} at delta {facts['delta']:.0e}."
        )
    else:
        releases = "" if facts["num_releases"] == 1 else f", {facts['num_releases']} releases together"
        lines.append(
            f"Differential privacy ({facts['mechanism']}): epsilon {facts['epsilon']:.2f} at delta "
            f"{facts['delta']:.0e}{releases}, for {covers}."
        )
    lines.append(f"Neighbours: {facts['neighbours']}.")
    if facts.get("epsilon_if_replaced") is not None:
        lines.append(f"If one client's upload is replaced by any other: epsilon {facts['epsilon_if_replaced']:.2f}.")
    if facts["public"]:
        lines.append(f"Called public by the operator, left as they are: {', '.join(facts['public'])}.")
    if facts["noise"] == "seeded":
        lines.append("The noise comes from the run's seed: who knows the seed can take it away. Simulations only.")
    return lines
