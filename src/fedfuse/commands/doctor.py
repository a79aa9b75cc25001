"""``fedfuse doctor``: whether this installation can do its work."""

from __future__ import annotations

import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Args:
        what: its name.
        seen: what was seen.
        is_fine: whether fedfuse can work with it.
    """

    what: str
    seen: str
    is_fine: bool = True


_OPTIONAL = {
    "datasets": 'parquet and hub data; pip install "fedfuse[data]"',
    "pyarrow": 'parquet files; pip install "fedfuse[data]"',
    "PIL": 'images in files; pip install "fedfuse[data]"',
    "onnx": 'export to ONNX; pip install "fedfuse[onnx]"',
    "flwr_datasets": 'partitions of flwr-datasets; pip install "fedfuse[partitions]"',
    "timm": "models of timm",
    "torchvision": "models of torchvision",
}


def examine() -> Iterator[Finding]:
    """Look at versions, threads, devices, optional parts, plug-ins, the disk, and do a small run.

    Yields:
        A finding at a time.
    """
    from fedfuse.experiment import versions

    for name, version in versions().items():
        yield Finding(name, version)
    import torch

    yield Finding("cores", f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads")
    yield Finding(
        "cuda", torch.cuda.get_device_name() if torch.cuda.is_available() else "none, clients compute on the CPU"
    )
    for name, use in _OPTIONAL.items():
        # torchvision beside a CPU build of torch fails with RuntimeError, not ImportError.
        try:
            module = importlib.import_module(name)
            yield Finding(name, getattr(module, "__version__", "installed"))
        except (ImportError, RuntimeError) as error:
            yield Finding(name, f"not there ({use})" if isinstance(error, ImportError) else f"broken: {error}")
    yield from _plug_ins()
    free = shutil.disk_usage(Path.cwd()).free
    yield Finding("disk", f"{free / 2**30:.1f} GiB free here", free > 1 << 30)
    yield _small_run()


def _plug_ins() -> Iterator[Finding]:
    from fedfuse.core import registry

    for kind in (
        registry.METHODS,
        registry.SOURCES,
        registry.PARTITIONS,
        registry.MODELS,
        registry.RUNTIMES,
        registry.RULES,
    ):
        yield Finding(f"{kind.kind}s", ", ".join(kind.names()))
        for name, reason in kind.failed_entry_points.items():
            yield Finding(f"plug-in {name}", reason, is_fine=False)


def _small_run() -> Finding:
    """Two clients on digits, twice: it works, and it gives the same bits."""
    from fedfuse.experiment import run

    config = {
        "data": {"source": "digits", "limit": 200, "partition": {"scheme": "iid", "num_clients": 2}},
        "model": {"family": "mlp", "width": 16},
        "method": {"name": "fusefl", "num_blocks": 2, "local": {"num_epochs": 2}},
    }
    try:
        digests = []
        for _ in range(2):
            with tempfile.TemporaryDirectory() as folder:
                digests.append(run(config, out=folder).facts["artifact"]["digest"])
    except Exception as error:
        return Finding("small run", f"{type(error).__name__}: {error}", is_fine=False)
    if digests[0] != digests[1]:
        return Finding("small run", "two equal runs gave different models", is_fine=False)
    return Finding("small run", f"twice the same model, digest {digests[0][:12]}")
