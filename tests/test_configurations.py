"""Every configuration under papers/ and examples/ is read, resolved and built, with all the methods that it lists."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedfuse.core.registry import METHODS
from fedfuse.experiment import Config, read_config, resolve
from fedfuse.experiment.comparing import method_entry
from fedfuse.experiment.configuration import NamedSection, family_of
from fedfuse.methods.fedavg import FedAvg

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted(
    path for room in ("papers", "examples") for end in ("yaml", "yml") for path in (ROOT / room).rglob(f"*.{end}")
)


def _methods(config: Config) -> dict[str, Config]:
    entries = [method_entry(entry, config) for entry in config.methods]
    return {label: config.model_copy(update={"method": NamedSection(**section)}) for label, section in entries}


def test_there_are_some() -> None:
    rooms = {path.relative_to(ROOT).parts[0] for path in FILES}
    assert rooms == {"papers", "examples"}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_it_resolves_to_a_whole_configuration(path: Path) -> None:
    config = read_config(path)
    resolved = resolve(config)
    assert resolve(read_config(resolved)) == resolved
    methods = _methods(config)
    assert len(methods) == len(config.methods), "two methods have one label"
    for label, one in methods.items():
        found = resolve(one)
        assert resolve(read_config(found)) == found, label
        local = found["method"].get("local")
        if local and "num_blocks" in found["method"]:
            assert local["num_epochs"] >= found["method"]["num_blocks"], label
        if local and issubclass(METHODS.get(one.method.name), FedAvg):
            assert local["num_epochs"] >= found["method"]["num_rounds"], label


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_its_models_can_be_built(path: Path) -> None:
    config = read_config(path)
    # Shapes decide nothing that a configuration could get wrong but the patches of a transformer: 32 is a multiple.
    for client_id in ("", *config.model.clients):
        name, family = family_of(config.model, client_id)
        if name in ("transformers", "diffusers"):
            # A base lies elsewhere, and its inputs are tokens of its own tokenizer: building them is tested by itself.
            continue
        if name in ("timm", "torchvision"):
            pytest.importorskip(name)
        with torch.device("meta"):
            module = family.build((3, 32, 32), 10)
        assert sum(p.numel() for p in module.parameters()) > 0
