"""The sections of a configuration: what may stand in a YAML file, and of which kind it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import pydantic

from fedfuse.core.fixed_point import SUMS_WHERE, SumSettings
from fedfuse.core.settings import from_json


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")


class _OpenSection(pydantic.BaseModel):
    """A section whose other keys are the settings of what it names."""

    model_config = pydantic.ConfigDict(frozen=True, extra="allow")

    @property
    def others(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class ServerDataSection(_OpenSection):
    """``data.server``: data of the server's own, of the same kind as the clients'; never of the test part.

    Args:
        fraction: share of the training examples that is held out before clients get theirs, in (0, 1); or
        num_examples: how many are held out; or
        source: name in the registry of sources, with its settings beside it: its training part is the server's.
        limit: use the first rows of that source only; ``None`` is all.
        labelled: whether the server knows the labels; else methods see inputs only.
    """

    fraction: float | None = None
    num_examples: int | None = None
    source: str | None = None
    limit: pydantic.PositiveInt | None = None
    labelled: bool = False


class DataSection(_OpenSection):
    """``data``: a source and its settings, and how its examples are split over clients.

    Args:
        source: name in the registry of sources.
        partition: ``scheme`` and its settings.
        limit: use the first training rows only; ``None`` is all.
        test_limit: use the first test rows only; ``None`` is all.
        validation_fraction: part of each client's training data that is set apart, in [0, 1).
        normalize: ``auto``, ``none``, or ``{mean: [...], std: [...]}``.
        augment: name of an augmentation, ``none`` or ``auto``.
        server: data of the server's own; ``None`` is none.
        labels: own name of a class to the common name, or client id to such a table; names without one stay.
        resize: side in pixels that all images are brought to; ``None`` keeps the images' own.
        without: clients of the partition that do not take part; ``fedfuse remove`` writes it.
        late: client id to a source and its settings, for clients beside the partition; ``fedfuse add`` writes it.
    """

    source: str
    partition: dict[str, Any] = pydantic.Field(default_factory=lambda: {"scheme": "iid", "num_clients": 5})
    limit: pydantic.PositiveInt | None = None
    test_limit: pydantic.PositiveInt | None = None
    validation_fraction: float = pydantic.Field(0.1, ge=0, lt=1)
    normalize: str | dict[str, list[float]] = "auto"
    augment: str = "auto"
    server: ServerDataSection | None = None
    labels: dict[str | int, str | int | dict[str | int, str | int]] = pydantic.Field(default_factory=dict)
    resize: pydantic.PositiveInt | None = None
    without: list[str] = pydantic.Field(default_factory=list)
    late: dict[str, dict[str, Any]] = pydantic.Field(default_factory=dict)


class ModelSection(_OpenSection):
    """``model``: a family and its settings; ``clients`` gives single clients a model of their own.

    Args:
        family: name in the registry of models.
        clients: client id to the settings that differ for it; may name another family.
    """

    family: str = "cnn"
    clients: dict[str, dict[str, Any]] = pydantic.Field(default_factory=dict)


class NamedSection(_OpenSection):
    """``method`` and ``runtime``: a name in a registry and its settings.

    Args:
        name: the registry key.
    """

    name: str


class FederationSection(_Section):
    """``federation``: what the operator decides about every exchange.

    Args:
        quorum: fraction of the clients that must answer, in (0, 1].
        timeout_s: most seconds that one client may take; in a real federation the deadline of an exchange, counted
            from when the clients are asked. ``None`` is no limit.
        max_upload_bytes: uploads above are refused.
        clients: in a real federation, who takes part: name to public key; an empty key trusts the first one that comes
            under this name. Nobody else is let in; where nobody is named, everybody is.
        late: in a real federation, what becomes of an upload that comes after its exchange: ``merge`` fuses again
            with it where the method can, ``record`` only keeps it.
        codec: how messages are compressed on their way: ``none`` or ``zlib``.
        secure_aggregation: add uploads up without seeing them, and how; ``{}`` takes the defaults. For methods that
            need only a sum, on Flower. ``None`` shows the server every upload.
    """

    quorum: float = pydantic.Field(1.0, gt=0, le=1)
    timeout_s: pydantic.PositiveFloat | None = None
    max_upload_bytes: pydantic.PositiveInt = 4 << 30
    clients: dict[str, str] = pydantic.Field(default_factory=dict)
    late: Literal["merge", "record"] = "merge"
    codec: Literal["none", "zlib"] = "none"
    secure_aggregation: SumSettings | None = None

    @pydantic.field_validator("secure_aggregation", mode="before")
    @classmethod
    def _sum_settings(cls, value: Any) -> Any:
        return from_json(SumSettings, value, where=SUMS_WHERE) if isinstance(value, Mapping) else value

    @pydantic.field_validator("clients", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return dict.fromkeys(value, "") if isinstance(value, list) else value


class AttackSection(_OpenSection):
    """``attack``: hostile clients, in a simulation.

    Args:
        name: name in the registry of attacks, with its settings beside it.
        clients: ids of the hostile clients, or how many: the first in the order of ids. 0 is nobody: what the attack
            would want is measured all the same.
    """

    name: str
    clients: int | list[str] = 1


class ServerSection(_Section):
    """``server``: how the server computes.

    Args:
        threads: torch threads; ``None`` is one per core and is written into the run's configuration, because the
            number changes bits.
        device: ``cpu``, ``cuda`` or ``auto``.
    """

    threads: pydantic.PositiveInt | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"


class Config(_Section):
    """A whole configuration; see the sections.

    Args:
        seed: decides every random choice of the run.
        data: where examples come from and who holds what.
        model: what clients own.
        method: how their uploads are fused.
        runtime: what carries requests to clients.
        federation: the operator's decisions.
        server: how the server computes.
        attack: hostile clients; ``None`` is none.
        privacy: what becomes of uploads before they leave their clients, see ``core.release.Privacy``; ``None`` is
            nothing.
        upload: how uploads are said in fewer bytes after that: ``codec``, a name in the registry of codecs, and its
            settings; ``None`` sends them as they are.
        methods: for ``compare``: names, or tables like ``method`` with an optional ``label``.
    """

    seed: int = 0
    data: DataSection
    model: ModelSection = pydantic.Field(default_factory=ModelSection)
    method: NamedSection = pydantic.Field(default_factory=lambda: NamedSection(name="fusefl"))
    runtime: NamedSection = pydantic.Field(default_factory=lambda: NamedSection(name="local"))
    federation: FederationSection = pydantic.Field(default_factory=lambda: FederationSection.model_validate({}))
    server: ServerSection = pydantic.Field(default_factory=ServerSection)
    attack: AttackSection | None = None
    privacy: dict[str, Any] | None = None
    upload: dict[str, Any] | None = None
    methods: list[str | dict[str, Any]] = pydantic.Field(default_factory=list)
