"""What a server tells every client before it asks anything, and the client's machine that is made from it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.client import ClientSide, StateStore
from fedfuse.core.cohort import check_client_id
from fedfuse.core.errors import ConfigError, FedfuseError, ModelError, PayloadError
from fedfuse.core.examples import ClientData
from fedfuse.core.guarantee import Releases
from fedfuse.core.method import Method
from fedfuse.core.noise import noise_secret
from fedfuse.core.payload import Payload
from fedfuse.core.registry import METHODS, RUNTIMES
from fedfuse.core.release import Privacy
from fedfuse.core.settings import from_json, to_json
from fedfuse.data.dataset import Dataset
from fedfuse.data.federate import FederatedData
from fedfuse.data.labels import LabelSetting
from fedfuse.data.membership import own_part
from fedfuse.data.normalize import Normalization
from fedfuse.experiment.compressing import resolved_upload
from fedfuse.experiment.configuration import Config, named
from fedfuse.experiment.private import SECRET_FILE, resolved_privacy
from fedfuse.experiment.setting import Setting, label_setting

_FORMAT = 1


@dataclass(frozen=True)
class Agreement:
    """What all sides of a real federation must hold alike, so that every client computes what it would in a simulation.

    Args:
        seed: of the run.
        method: the method's name; for the client's owner to know.
        method_settings: its settings; likewise.
        data: what inputs and labels look like; holds nobody's data.
        model: what clients own.
        client_models: client id to a model of its own.
        validation_fraction: part of each client's data that is set apart.
        labels: own name of a class to the common name, for all or under a client's id.
        resize: side in pixels that images are brought to.
        client_threads: torch threads that clients compute with; their number changes bits.
        privacy: the section ``privacy``; empty where uploads leave as they are.
        upload: the section ``upload``; empty where uploads are not coded.
    """

    seed: int
    method: str
    method_settings: Mapping[str, Any]
    data: FederatedData
    model: ModelSpec
    client_models: Mapping[str, ModelSpec] = field(default_factory=dict)
    validation_fraction: float = 0.1
    labels: LabelSetting = field(default_factory=dict)
    resize: int | None = None
    client_threads: int = 1
    privacy: Mapping[str, Any] = field(default_factory=dict)
    upload: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Config, setting: Setting, method: Method | None = None) -> Agreement:
        """The agreement that a configuration stands for.

        Args:
            config: the configuration.
            setting: its federation; the clients' data are left out.
            method: instead of the configuration's.
        """
        chosen: Method = method or named(METHODS, config.method.name, config.method.others, "method")
        runtime = named(RUNTIMES, config.runtime.name, config.runtime.others, "runtime")
        return cls(
            seed=config.seed,
            method=chosen.name,
            method_settings=to_json(chosen),
            data=replace(setting.data, clients={}, positions={}, test=None, server=None),
            model=setting.model,
            client_models=dict(setting.client_models),
            validation_fraction=config.data.validation_fraction,
            labels=label_setting(config),
            resize=config.data.resize,
            client_threads=getattr(runtime, "client_threads", 1),
            privacy=resolved_privacy(config).get("privacy", {}),
            upload=resolved_upload(config).get("upload", {}),
        )

    def model_of(self, client_id: str) -> ModelSpec:
        """The model that a client owns.

        Args:
            client_id: its id.
        """
        return self.client_models.get(client_id, self.model)

    def releases(self) -> Releases:
        """What becomes of uploads before they leave their clients."""
        return Releases(from_json(Privacy, self.privacy, where="privacy") if self.privacy else None)

    def encode(self) -> bytes:
        """The agreement as the bytes of a payload.

        Returns:
            Bytes for :meth:`decode`; the same for the same content.

        Raises:
            ModelError: a model is a module that no recipe describes.
        """
        data = self.data
        facts = {
            "format": _FORMAT,
            "seed": self.seed,
            "method": self.method,
            "method_settings": self.method_settings,
            "input_shape": list(data.input_shape),
            "class_names": list(data.class_names),
            "mean": list(data.normalization.mean),
            "std": list(data.normalization.std),
            "augment": data.augment,
            "is_pixels": data.is_pixels,
            "model": _model_facts(self.model),
            "client_models": {client_id: _model_facts(spec) for client_id, spec in sorted(self.client_models.items())},
            "validation_fraction": self.validation_fraction,
            "labels": dict(self.labels),
            "resize": self.resize,
            "client_threads": self.client_threads,
            "privacy": dict(self.privacy),
            "upload": dict(self.upload),
        }
        payload = Payload({"agreement": json.dumps(facts, sort_keys=True)})
        payload.put_group("model", self.model.initial)
        for client_id, spec in self.client_models.items():
            payload.put_group(f"client_models/{client_id}", spec.initial)
        return payload.encode()

    @classmethod
    def decode(cls, data: bytes) -> Agreement:
        """Read an agreement.

        Args:
            data: what :meth:`encode` gave; any other bytes end in an error.

        Raises:
            PayloadError: it is none.
        """
        fix = "ask the server's operator for it again; both sides should run the same version of fedfuse"
        try:
            payload = Payload.decode(data)
            facts = json.loads(payload.text("agreement"))
            if facts["format"] != _FORMAT:
                raise PayloadError(
                    f"the agreement has format {facts['format']!r:.20}, this version reads {_FORMAT}", fix=fix
                )
            class_names = tuple(str(name) for name in facts["class_names"])
            federation = FederatedData(
                clients={},
                test=None,
                class_names=class_names,
                input_shape=tuple(int(size) for size in facts["input_shape"]),
                num_classes=len(class_names),
                normalization=Normalization(tuple(facts["mean"]), tuple(facts["std"])),
                is_pixels=bool(facts["is_pixels"]),
                augment=str(facts["augment"]),
            )
            return cls(
                seed=int(facts["seed"]),
                method=str(facts["method"]),
                method_settings=dict(facts["method_settings"]),
                data=federation,
                model=_model_of(facts["model"], payload.group("model")),
                client_models={
                    check_client_id(client_id): _model_of(model, payload.group(f"client_models/{client_id}"))
                    for client_id, model in facts["client_models"].items()
                },
                validation_fraction=float(facts["validation_fraction"]),
                labels=dict(facts["labels"]),
                resize=facts["resize"],
                client_threads=int(facts["client_threads"]),
                privacy=dict(facts["privacy"]),
                upload=dict(facts["upload"]),
            )
        except PayloadError:
            raise
        except (FedfuseError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise PayloadError(f"this is no agreement: {error}", fix=fix) from None


def _model_facts(spec: ModelSpec) -> dict[str, Any]:
    if spec.template is not None:
        raise ModelError(
            "the model cannot be described, so clients elsewhere cannot build it",
            where=type(spec.template).__name__,
            fix="write it with the layers and functions of torch, without branches on values, or use a family",
        )
    return {
        "recipe": spec.recipe,
        "seed": spec.seed,
        "input_shape": list(spec.input_shape),
        "num_classes": spec.num_classes,
    }


def _model_of(facts: Mapping[str, Any], initial: Mapping[str, Tensor]) -> ModelSpec:
    shape = tuple(int(size) for size in facts["input_shape"])
    return ModelSpec(dict(facts["recipe"]), int(facts["seed"]), shape, int(facts["num_classes"]), initial)


def open_side(
    agreement: Agreement,
    client_id: str,
    dataset: Dataset | ClientData,
    *,
    home: Path | None,
    num_threads: int | None = None,
    device: str = "cpu",
) -> ClientSide:
    """A client's machine, from its own data and the agreement.

    Args:
        agreement: what the server told.
        client_id: the client.
        dataset: its data set; or its part of a simulation, as the federation sees it.
        home: where its states are kept; ``None`` keeps them in memory.
        num_threads: torch threads; the agreement's if left out.
        device: ``cpu`` or ``cuda``.

    Raises:
        DataError: the data do not fit the federation's.
        ConfigError: the device is not there.
    """
    check_client_id(client_id)
    if device == "cuda" and not torch.cuda.is_available():
        raise ConfigError("there is no CUDA device", where="--device", fix="use cpu")
    if isinstance(dataset, Dataset):
        dataset = own_part(
            agreement.data,
            client_id,
            dataset,
            seed=agreement.seed,
            validation_fraction=agreement.validation_fraction,
            labels=agreement.labels,
            resize=agreement.resize,
        )
    return ClientSide(
        client_id,
        dataset,
        agreement.model_of(client_id),
        torch.device(device),
        num_threads or agreement.client_threads,
        StateStore(None if home is None else home / "states"),
        b"" if home is None else noise_secret(home / SECRET_FILE),
        agreement.releases().terms(),
    )
