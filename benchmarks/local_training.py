"""Local training: images per second by precision and memory format, on one torch thread.

python benchmarks/local_training.py [--repeats 3] [--compile]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from fedfuse import models
from fedfuse.core.examples import Examples
from fedfuse.core.seeding import Rng
from fedfuse.training import LocalSGD, train

MODELS = {
    "cnn width 16, 28x28x1": ("cnn", {"width": 16}, (1, 28, 28), 3840),
    "cnn width 32, 28x28x1": ("cnn", {"width": 32}, (1, 28, 28), 1920),
    "resnet18 width 8, 32x32x3": ("resnet", {"width": 8}, (3, 32, 32), 1280),
    "resnet18 width 16, 32x32x3": ("resnet", {"width": 16}, (3, 32, 32), 640),
}
WAYS = {
    "fp32": {"precision": "fp32", "channels_last": False},
    "fp32, channels_last": {"precision": "fp32", "channels_last": True},
    "bf16": {"precision": "bf16", "channels_last": False},
    "bf16, channels_last": {"precision": "bf16", "channels_last": True},
}


def images_per_second(name: str, way: dict[str, object], repeats: int) -> float:
    """Median over repeats of one epoch at batch 128, after a short one that warms up."""
    family, settings, shape, count = MODELS[name]
    generator = torch.Generator().manual_seed(0)
    examples = Examples(
        torch.randn(count, *shape, generator=generator), torch.randint(10, (count,), generator=generator)
    )
    spec = models.spec(family, settings, input_shape=shape, num_classes=10, seed=0)
    local = LocalSGD(num_epochs=1, batch_size=128, **way)
    module, speeds = spec.build(), []
    train(module, examples.subset(range(256)), local, rng=Rng(0), device=torch.device("cpu"))
    for repeat in range(repeats):
        start = time.perf_counter()
        train(module, examples, local, rng=Rng(repeat), device=torch.device("cpu"))
        speeds.append(count / (time.perf_counter() - start))
    return statistics.median(speeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="also measure torch.compile; its first step takes long")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ways = {**WAYS, **({"fp32, compiled": {"compile": True}} if arguments.compile else {})}
    print("| model | " + " | ".join(ways) + " |")
    print("|---" * (len(ways) + 1) + "|")
    for name in MODELS:
        speeds = [f"{images_per_second(name, way, arguments.repeats):,.0f}" for way in ways.values()]
        print(f"| {name} | " + " | ".join(speeds) + " |", flush=True)


if __name__ == "__main__":
    main()
