"""The sections of a configuration: what may stand in a YAML file, and of which kind it is."""

from __future__ import annotations

from typing import Any, Literal

import pydantic


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
        timeout_s: most seconds that one client may take; ``None`` is no limit.
        max_upload_bytes: uploads above are refused.
    """

    quorum: float = pydantic.Field(1.0, gt=0, le=1)
    timeout_s: pydantic.PositiveFloat | None = None
    max_upload_bytes: pydantic.PositiveInt = 4 << 30


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
        methods: for ``compare``: names, or tables like ``method`` with an optional ``label``.
    """

    seed: int = 0
    data: DataSection
    model: ModelSection = pydantic.Field(default_factory=ModelSection)
    method: NamedSection = pydantic.Field(default_factory=lambda: NamedSection(name="fusefl"))
    runtime: NamedSection = pydantic.Field(default_factory=lambda: NamedSection(name="local"))
    federation: FederationSection = pydantic.Field(default_factory=lambda: FederationSection.model_validate({}))
    server: ServerSection = pydantic.Field(default_factory=ServerSection)
    methods: list[str | dict[str, Any]] = pydantic.Field(default_factory=list)
