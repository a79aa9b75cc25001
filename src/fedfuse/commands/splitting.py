"""``fedfuse split``: a simulated federation as one file per client, to try a real one with."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from torch import Tensor

from fedfuse.core.errors import ConfigError
from fedfuse.core.examples import Examples
from fedfuse.core.files import write_atomically
from fedfuse.core.seeding import Rng
from fedfuse.data.dataset import Dataset
from fedfuse.data.resizing import resized
from fedfuse.data.server import HeldOut
from fedfuse.experiment import Config, resolve
from fedfuse.experiment.setting import Loader, Setting


def split(config: Config, out: Path) -> list[Path]:
    """Write each simulated client's examples, the test part, and the configuration of the real federation.

    A real federation of these files gives the same model, bit for bit, as the simulation.

    Args:
        config: of a simulation.
        out: the folder; ``federation.yaml`` is its configuration, ``NAME.npz`` the data of a client.

    Returns:
        The files.

    Raises:
        ConfigError: the data are not split yet by a partition, or the folder holds other files of these names.
    """
    if config.data.source == "remote":
        raise ConfigError("these data are with their owners already", where="data.source", fix="nothing is to be split")
    loader = Loader(config)
    setting = loader.setting(config.seed)
    data, dataset = setting.data, loader.dataset()
    if set(data.positions) != set(data.clients):
        raise ConfigError(
            "clients that came late have files of their own already", where="data.late", fix="leave it out"
        )
    files = {
        f"{client_id}.npz": _archive(dataset.train.subset(rows), dataset, config.data.resize)
        for client_id, rows in data.positions.items()
    }
    if dataset.test is not None:
        files["test.npz"] = _archive(dataset.test, dataset, config.data.resize)
    part = loader.server_part()
    if part is not None and data.server is not None:
        if isinstance(part, HeldOut):
            part = dataset.train.subset(part.rows(dataset, Rng(config.seed).numpy("server data")))
        files["server.npz"] = _archive(part, dataset, config.data.resize)
    files["federation.yaml"] = yaml.safe_dump(_real(config, setting, out, files), sort_keys=False).encode()
    for name in files:
        if (out / name).exists() and (out / name).read_bytes() != files[name]:
            raise ConfigError("the file is there already", where=str(out / name), fix="name another folder")
    for name, content in files.items():
        write_atomically(out / name, content)
    return [out / name for name in files]


def _archive(examples: Examples, dataset: Dataset, side_px: int | None) -> bytes:
    examples = examples if side_px is None else resized(examples, side_px)
    buffer = io.BytesIO()
    # Classes go by their names: a client that lacks some would number the others differently.
    names = np.array([dataset.class_names[y] if y >= 0 else "" for y in examples.y.tolist()])
    np.savez_compressed(buffer, x=_numbers(examples.x), y=names)
    return buffer.getvalue()


def _numbers(x: Tensor) -> np.ndarray:
    return x.detach().cpu().numpy()


def _real(config: Config, setting: Setting, out: Path, files: dict[str, bytes]) -> dict[str, Any]:
    """The configuration of the real federation, with everything that was measured written down."""
    table, data = resolve(config), setting.data
    mean, std = data.normalization.mean, data.normalization.std
    remote: dict[str, Any] = {
        "source": "remote",
        "input_shape": list(data.input_shape),
        "class_names": list(data.class_names),
        "is_pixels": data.is_pixels,
        "validation_fraction": config.data.validation_fraction,
        "normalize": {"mean": list(mean), "std": list(std)} if mean else "none",
        "augment": data.augment,
        "labels": table["data"]["labels"],
        "resize": config.data.resize,
    }
    if "test.npz" in files:
        remote["test"] = {"source": "npz", "path": str((out / "test.npz").resolve())}
    if "server.npz" in files and config.data.server is not None:
        remote["server"] = {
            "source": "npz",
            "path": str((out / "server.npz").resolve()),
            "labelled": config.data.server.labelled,
        }
    real = {key: value for key, value in table.items() if key != "runtime"}
    clients = dict(config.federation.clients) or dict.fromkeys(data.clients, "")
    return {**real, "data": remote, "federation": {**table["federation"], "clients": clients}}
