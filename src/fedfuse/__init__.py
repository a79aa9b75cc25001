"""fedfuse: one strong model from data that cannot leave its owners, with one upload from each of them.

The names below are imported when they are first used, so that ``import fedfuse`` is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedfuse.core.artifact import Artifact, ModelSpec, load
    from fedfuse.core.client import Client
    from fedfuse.core.cohort import Cohort, Replies
    from fedfuse.core.errors import FedfuseError
    from fedfuse.core.expecting import TensorSpec
    from fedfuse.core.method import Fused, Job, Method, client_task, register_method
    from fedfuse.core.payload import Payload
    from fedfuse.core.registry import (
        register_model,
        register_partition,
        register_rule,
        register_runtime,
        register_source,
    )
    from fedfuse.distilling import distill
    from fedfuse.experiment import Result, compare, run
    from fedfuse.fusing import fuse
    from fedfuse.training.sgd import LocalSGD

_HOMES = {
    "fedfuse.core.artifact": ("Artifact", "ModelSpec", "load"),
    "fedfuse.core.client": ("Client",),
    "fedfuse.core.cohort": ("Cohort", "Replies"),
    "fedfuse.core.errors": ("FedfuseError",),
    "fedfuse.core.expecting": ("TensorSpec",),
    "fedfuse.core.method": ("Fused", "Job", "Method", "client_task", "register_method"),
    "fedfuse.core.payload": ("Payload",),
    "fedfuse.core.registry": (
        "register_model",
        "register_partition",
        "register_rule",
        "register_runtime",
        "register_source",
    ),
    "fedfuse.distilling": ("distill",),
    "fedfuse.experiment": ("Result", "compare", "run"),
    "fedfuse.fusing": ("fuse",),
    "fedfuse.training.sgd": ("LocalSGD",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Artifact",
    "Client",
    "Cohort",
    "FedfuseError",
    "Fused",
    "Job",
    "LocalSGD",
    "Method",
    "ModelSpec",
    "Payload",
    "Replies",
    "Result",
    "TensorSpec",
    "client_task",
    "compare",
    "distill",
    "fuse",
    "load",
    "register_method",
    "register_model",
    "register_partition",
    "register_rule",
    "register_runtime",
    "register_source",
    "run",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from fedfuse.core import VERSION

        return VERSION
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    if not name[:1].isupper():
        raise AttributeError(f"module 'fedfuse' has no attribute {name!r}")
    # Methods by class name: fedfuse.FuseFL(num_blocks=4).
    from fedfuse.core.registry import METHODS

    for key in METHODS.names():
        if METHODS.get(key).__name__ == name:
            return METHODS.get(key)
    raise AttributeError(f"module 'fedfuse' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
