"""Differential privacy of what a client uploads: the operator's settings, and what the client does before it sends."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.errors import ConfigError, DataError, TaskError
from fedfuse.core.gaussian import gaussian_noise_multiplier
from fedfuse.core.known import Known
from fedfuse.core.noise import Noise
from fedfuse.core.payload import Payload, Value, matches
from fedfuse.core.seeding import Rng
from fedfuse.core.settings import from_json, to_json

Mechanism = Literal["local", "central", "trained"]

CURVES = ("curve/*",)
SPENT = "curve/epsilon"
"""What a client that trained privately has spent; it depends on settings and on its number of examples alone."""

_TRAINED_KEYS = ("model/*",)
_LEAST_VARIANCE = 1e-5


@dataclass(frozen=True, kw_only=True)
class ReleaseTerms:
    """What a client does to an upload; it travels with every question and is part of it.

    Args:
        mechanism: as in :class:`Privacy`.
        clip_norm: largest L2 norm of all released tensors together; ``None`` does not clip.
        noise_multiplier: the client's noise in units of ``clip_norm``; 0 adds none.
        keys: patterns of the tensors that are released; empty is all.
        public: patterns of what leaves as it is.
        constants: pattern to the value that takes the place of whatever it matches.
    """

    mechanism: Mechanism
    clip_norm: float | None
    noise_multiplier: float
    keys: tuple[str, ...]
    public: tuple[str, ...]
    constants: dict[str, bool | int | float]

    def __post_init__(self) -> None:
        if self.clip_norm is not None:
            _check_above_zero("clip_norm", self.clip_norm)
        if not (0 <= self.noise_multiplier < math.inf):
            raise ConfigError(
                f"noise_multiplier is {self.noise_multiplier:g}",
                where="privacy.noise_multiplier",
                fix="give 0 or more",
            )


@dataclass(frozen=True, kw_only=True)
class Privacy:
    """The section ``privacy``: what becomes of every upload before it leaves its client.

    All released tensors of an upload are clipped together to one L2 norm: weights by their difference to those that
    the client was sent or started from, other tensors by themselves. Then comes Gaussian noise. Everything else that an
    upload holds must be named: ``public`` leaves as it is, ``constants`` replaces it. Curves are left out.

    Args:
        mechanism: ``local``: each client adds the noise, nobody need be trusted. ``central``: clients clip, a trusted
            server hands only the noisy mean to the method. ``trained``: nothing is added, because
            ``method.local.privacy`` made the weights private while they were trained.
        clip_norm: largest L2 norm, above 0; one client can change the released vector by this much.
        noise_multiplier: noise in units of ``clip_norm``: of each upload (local) or of the sum (central); or
        epsilon: instead, what all releases of the run together may spend.
        delta: in (0, 1); well below one over the number of clients.
        num_releases: how often each client may upload in the run; ``epsilon`` is divided over them.
        keys: patterns of the tensors that are released; empty is all (``trained``: ``model/*``).
        public: patterns of what leaves as it is, because it is known anyway; not with ``central``.
        constants: pattern to a number that replaces it for all clients, such as ``num_examples: 1``.
        noise: ``secret`` noise comes from keys that only its maker has, ``seeded`` noise from the run's seed, for
            repeatable simulations. ``auto`` is seeded in a simulation and secret in a real federation, whose clients
            always use their own secret.
    """

    mechanism: Mechanism = "local"
    clip_norm: float | None = None
    noise_multiplier: float | None = None
    epsilon: float | None = None
    delta: float = 1e-5
    num_releases: int = 1
    keys: tuple[str, ...] = ()
    public: tuple[str, ...] = ()
    constants: dict[str, bool | int | float] = field(default_factory=dict)
    noise: Literal["auto", "seeded", "secret"] = "auto"

    def __post_init__(self) -> None:
        given = {"clip_norm": self.clip_norm, "noise_multiplier": self.noise_multiplier, "epsilon": self.epsilon}
        if self.mechanism == "trained":
            for name, value in given.items():
                if value is not None:
                    raise ConfigError(
                        f"{name} has no meaning where the noise is in the training",
                        where=f"privacy.{name}",
                        fix="set method.local.privacy, or mechanism: local",
                    )
            return
        if self.clip_norm is None:
            raise ConfigError(
                'the setting "clip_norm" is missing',
                where="privacy.clip_norm",
                fix="give the largest L2 norm of an upload; about the median norm of honest updates is a good start",
            )
        if (self.noise_multiplier is None) == (self.epsilon is None):
            raise ConfigError(
                "the noise is not determined",
                where="privacy",
                fix="give either noise_multiplier or epsilon",
            )
        if self.mechanism == "central" and self.public:
            raise ConfigError(
                "the noise of the mean is made for uploads of equal weight",
                where="privacy.public",
                fix="name these keys in privacy.constants, such as {num_examples: 1}",
            )
        if not 0 < self.delta < 1:
            raise ConfigError(f"delta is {self.delta:g}", where="privacy.delta", fix="give a number between 0 and 1")
        if self.num_releases < 1:
            raise ConfigError(
                f"num_releases is {self.num_releases}", where="privacy.num_releases", fix="give at least 1"
            )
        # Wrong numbers are told now, not when the clients have begun.
        _ = self.terms()

    @property
    def multiplier(self) -> float:
        """The noise multiplier of one release, made from ``epsilon`` where that is given."""
        if self.epsilon is not None:
            return gaussian_noise_multiplier(self.epsilon, self.delta, self.num_releases)
        return self.noise_multiplier or 0.0

    def terms(self) -> dict[str, Any]:
        """What clients are told, as JSON. Under ``central`` that is no noise, so other noise needs no other upload."""
        terms = ReleaseTerms(
            mechanism=self.mechanism,
            clip_norm=self.clip_norm,
            noise_multiplier=self.multiplier if self.mechanism == "local" else 0.0,
            keys=self.keys or (_TRAINED_KEYS if self.mechanism == "trained" else ()),
            public=self.public,
            constants=self.constants,
        )
        return to_json(terms)


def _check_above_zero(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} is {value:g}", where=f"privacy.{name}", fix="give a number above 0")


def release(upload: Payload, terms: Mapping[str, Any], message: bytes, model: ModelSpec, rng: Rng) -> Payload:
    """What leaves the client in place of an upload.

    Args:
        upload: what the task made; left as it is.
        terms: :class:`ReleaseTerms` as JSON.
        message: the encoded message that the task answers; both sides know it.
        model: the client's model; both sides know its first weights.
        rng: the client's source; its secret, where there is one, makes the noise.

    Returns:
        The released upload.

    Raises:
        TaskError: the upload holds something that the operator did not say what to do with.
        DataError: it is not finite.
    """
    agreed = from_json(ReleaseTerms, terms, where="privacy")
    known = Known.of(message, model)
    found, moves = Payload(), {}
    for key, value in upload.items():
        kind = sort_of(key, value, agreed)
        if kind == "constant":
            found[key] = _constant(key, value, agreed.constants)
        elif kind in ("public", "spent"):
            found[key] = value
        elif kind == "released":
            assert isinstance(value, Tensor)
            if value.is_floating_point():
                moves[key] = value.double() - _start_or_zeros(known, key, value).double()
            else:
                found[key] = _start(known, key, value, agreed.mechanism)
    if agreed.mechanism == "trained":
        if SPENT not in upload:
            raise TaskError(
                "an upload is to leave without noise, but it was not trained privately",
                where=SPENT,
                fix="set method.local.privacy, or use privacy.mechanism: local",
            )
        return Payload({**found, **{key: upload[key] for key in moves}})
    factor = clip_factor(moves, agreed.clip_norm)
    std = agreed.noise_multiplier * (agreed.clip_norm or 0.0)
    # The key holds all that the released numbers depend on: two different releases never share their noise.
    facts = [upload.digest(), hashlib.sha256(message).hexdigest(), json.dumps(to_json(agreed), sort_keys=True)]
    noise = Noise(rng.private_key("release", *facts))
    for key, move in moves.items():
        original = upload.tensor(key)
        value = _start_or_zeros(known, key, original).double() + factor * move
        if std:
            value = with_noise(key, value, std, noise)
        found[key] = value.to(original.dtype)
    return found


def sort_of(key: str, value: Value, terms: ReleaseTerms) -> str:
    """What becomes of one entry of an upload: ``constant``, ``public``, ``released``, ``spent`` or ``left out``.

    Args:
        key: its key.
        value: what the task made.
        terms: what was agreed.

    Raises:
        TaskError: the terms do not say.
    """
    if matches(key, terms.constants):
        return "constant"
    if matches(key, terms.public):
        return "public"
    if key == SPENT and terms.mechanism == "trained":
        return "spent"
    if matches(key, CURVES):
        return "left out"
    if isinstance(value, Tensor) and matches(key, terms.keys or ("*",)):
        return "released"
    what = "a tensor that privacy.keys does not name" if isinstance(value, Tensor) else "no tensor, so it gets no noise"
    raise _unnamed(key, what, terms.mechanism)


def _unnamed(key: str, what: str, mechanism: str) -> TaskError:
    public = "" if mechanism == "central" else f", or in privacy.public: [{key}] if it is known anyway"
    return TaskError(
        f'the private upload holds "{key}": {what}',
        where="privacy",
        fix=f"name it in privacy.constants: {{{key}: 1}} to replace it{public}",
    )


def clip_factor(moves: Mapping[str, Tensor], clip_norm: float | None) -> float:
    """The factor that brings tensors to an L2 norm of at most ``clip_norm``, all of them together.

    Args:
        moves: name to tensor.
        clip_norm: above 0; ``None`` does not clip.

    Returns:
        At most 1.

    Raises:
        DataError: a tensor is not finite.

    Example:
        >>> clip_factor({"a": torch.tensor([3.0]), "b": torch.tensor([4.0])}, 1.0)
        0.2
    """
    norm = math.sqrt(sum(float((move.double() ** 2).sum()) for move in moves.values()))
    if not math.isfinite(norm):
        raise DataError(
            "what the task made holds NaN or infinite values, which no clipping can bound",
            fix="lower method.local.learning_rate, or set method.local.grad_clip_norm",
        )
    return 1.0 if clip_norm is None or norm <= clip_norm else clip_norm / norm


def with_noise(key: str, value: Tensor, std: float, noise: Noise) -> Tensor:
    """Add noise to one tensor.

    Args:
        key: the tensor's key, which names the noise's stream.
        value: float64.
        std: the noise's standard deviation, above 0.
        noise: where it comes from.
    """
    noisy = value + std * noise.normal(key, value.shape).to(value.device)
    # Noise may bring a variance below zero, and the normalisation layer to NaN. To mend that only noisy numbers are
    # looked at, so it costs no privacy.
    return noisy.clamp(min=_LEAST_VARIANCE) if key.endswith("running_var") else noisy


def _constant(key: str, value: Value, constants: Mapping[str, bool | int | float]) -> Value:
    constant = next(number for pattern, number in constants.items() if matches(key, [pattern]))
    if isinstance(value, Tensor):
        return torch.full_like(value, constant)
    if isinstance(value, str):
        raise TaskError(f'"{key}" is a text', where="privacy.constants", fix="name it in privacy.public")
    return type(value)(constant)


def _start_or_zeros(known: Known, key: str, value: Tensor) -> Tensor:
    found = known.start_of(key, value)
    return torch.zeros_like(value) if found is None else found


def _start(known: Known, key: str, value: Tensor, mechanism: Mechanism) -> Tensor:
    found = known.start_of(key, value)
    if found is None:
        raise _unnamed(key, "whole numbers, which get no noise", mechanism)
    return found
