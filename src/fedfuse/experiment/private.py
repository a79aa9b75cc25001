"""The section ``privacy`` as objects: who makes noise from what."""

from __future__ import annotations

import hmac
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedfuse.core.errors import ConfigError
from fedfuse.core.guarantee import Releases
from fedfuse.core.method import Method
from fedfuse.core.noise import SECRET_BYTES, noise_secret
from fedfuse.core.release import Privacy
from fedfuse.core.seeding import Rng, derive_seed
from fedfuse.core.settings import from_json, to_json
from fedfuse.core.summing import methods_that_need_only_sums

if TYPE_CHECKING:
    from fedfuse.experiment.sections import Config

SECRET_FILE = "noise.key"


def privacy_of(config: Config) -> Privacy | None:
    """What the section ``privacy`` says; nothing where it is left out.

    Args:
        config: the configuration.

    Raises:
        ConfigError: a setting is unknown or wrong.
    """
    return None if config.privacy is None else from_json(Privacy, config.privacy, where="privacy")


def resolved_privacy(config: Config) -> dict[str, Any]:
    """The section with its defaults, to be written into a run's configuration; empty where it is left out.

    Args:
        config: the configuration.
    """
    privacy = privacy_of(config)
    return {} if privacy is None else {"privacy": to_json(privacy)}


def run_secret(config: Config, home: Path | None, *, is_simulation: bool) -> bytes:
    """What the noise of this run's own machine is made from; empty where it comes from the run's seed.

    Args:
        config: the configuration.
        home: where the secret is kept; ``None`` keeps it in memory.
        is_simulation: whether the clients are on this machine too.
    """
    privacy = privacy_of(config)
    if privacy is None or privacy.noise == "seeded" or (privacy.noise == "auto" and is_simulation):
        return b""
    return os.urandom(SECRET_BYTES) if home is None else noise_secret(home / SECRET_FILE)


def client_secret(secret: bytes, client_id: str) -> bytes:
    """A simulated client's own secret; empty where the run has none.

    Args:
        secret: the run's.
        client_id: whose.
    """
    return hmac.digest(secret, client_id.encode(), "sha256") if secret else b""


def releases_for(config: Config, method: Method, seed: int, secret: bytes, *, is_simulation: bool) -> Releases:
    """The account of a run.

    Args:
        config: the configuration.
        method: what is run.
        seed: the run's.
        secret: the run's, see :func:`run_secret`.
        is_simulation: whether the clients are on this machine too.

    Raises:
        ConfigError: the method cannot do with what the section leaves it.
    """
    privacy = privacy_of(config)
    if privacy is not None and privacy.mechanism == "central":
        _check_needs_only_sums(method)
    if privacy is not None and privacy.mechanism == "trained" and _training(method) is None:
        raise ConfigError(
            f'nothing in "{method.name}" trains privately',
            where="privacy.mechanism",
            fix="set method.local.privacy, or use mechanism: local",
        )
    # Clients elsewhere always make their noise from a secret of their own.
    is_secret = bool(secret) or (not is_simulation and (privacy is None or privacy.mechanism != "central"))
    training = _training(method) or {}
    return Releases(
        privacy,
        Rng(derive_seed(seed, "server"), secret),
        is_secret=is_secret,
        training_delta=float(training.get("delta", 0.0)),
    )


def _training(method: Method) -> dict[str, Any] | None:
    """Settings of the DP-SGD that a method's clients train by."""
    local = to_json(method).get("local")
    found = local.get("privacy") if isinstance(local, dict) else None
    return found if isinstance(found, dict) else None


def _check_needs_only_sums(method: Method) -> None:
    if type(method).summed_tasks():
        return
    raise ConfigError(
        f'"{method.name}" needs the uploads one by one, and central privacy leaves it their noisy mean alone',
        where="privacy.mechanism",
        fix=f"use mechanism: local, or a method that needs only sums: {', '.join(methods_that_need_only_sums())}",
    )
