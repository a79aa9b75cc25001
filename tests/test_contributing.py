"""The worked examples of CONTRIBUTING.md are run, in a process of their own so that no other test sees their names."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

USE = """
import numpy as np
import torch
from torch import nn

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.client import ClientSide
from fedfuse.core.cohort import Cohort
from fedfuse.core.examples import ClientData, Examples
from fedfuse.core.method import Job
from fedfuse.core.registry import METHODS, MODELS, PARTITIONS, RULES, RUNTIMES, SOURCES
from fedfuse.core.seeding import Rng

stack = torch.tensor([[1.0], [2.0], [9.0]], dtype=torch.float64)
assert RULES.get("midrange")().fuse(stack, torch.ones(3)).item() == 5.0

data = SOURCES.get("two_moons")(num_examples=10, noise=0.0).load(limit=7)
assert (len(data.train), len(data.test), data.num_classes) == (7, 10, 2)

parts = PARTITIONS.get("in_order")(num_clients=2).assign(data.train.y.numpy(), 2, np.random.default_rng(0), {})
assert {name: part.tolist() for name, part in parts.items()} == {"client_0": [0, 1, 2, 3], "client_1": [4, 5, 6]}

module = MODELS.get("softmax")().build(data.input_shape, data.num_classes)
assert module(data.train.x).shape == (7, 2)

spec = ModelSpec(recipe={"kind": "none"}, seed=0, input_shape=data.input_shape, num_classes=2, template=module)
sides = {
    name: ClientSide(name, ClientData(data.train.subset(part), data.train.subset(part[:0]), 2), spec)
    for name, part in parts.items()
}
runtime = RUNTIMES.get("one_by_one")().open(sides)
method = METHODS.get("prior_only")()
cohort = Cohort(runtime=runtime, method=method, model_of=lambda client_id: spec, seed=0)
fused = method.fuse(cohort, Job(model=spec, rng=Rng(0), device=torch.device("cpu")))
# Seven examples, alternating from class 0: four and three, each plus one.
expected = torch.tensor([5 / 9, 4 / 9]).log()
assert torch.allclose(fused.model.state["1.bias"], expected), fused.model.state["1.bias"]
print("all doors open")
"""


def test_the_worked_example_of_every_door_runs(repository: Path, tmp_path: Path) -> None:
    pytest.importorskip("fedfuse.data.dataset")
    text = (repository / "CONTRIBUTING.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 6, "one example per door: rule, method, partition, source, model family, runtime"
    for number, block in enumerate(blocks):
        (tmp_path / f"door_{number}.py").write_text(block, encoding="utf-8")
    imports = "".join(f"import door_{number}\n" for number in range(len(blocks)))
    (tmp_path / "use.py").write_text(imports + USE, encoding="utf-8")
    done = subprocess.run([sys.executable, "use.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "all doors open\n"
