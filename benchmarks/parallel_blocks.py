"""Seconds for M equal networks on one batch: side by side in one pass, against a plain loop. One thread, inference."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor, nn

from fedfuse.models import spec
from fedfuse.models.blocks import cut_spec
from fedfuse.models.parallel import parallel

MODELS: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("mlp", {"width": 64}, (1, 28, 28)),
    ("cnn", {"width": 16}, (1, 28, 28)),
    ("resnet", {"width": 8}, (3, 32, 32)),
    ("resnet", {"width": 16}, (3, 32, 32)),
]
BATCH_SIZE = 128
NUM_REPEATS = 5


def time_of(run: Callable[[], Any]) -> float:
    # Time of the thread, not of the wall: other processes on the machine do not count. The least of several.
    run()
    best_s = float("inf")
    for _ in range(NUM_REPEATS):
        start_s = time.thread_time()
        run()
        best_s = min(best_s, time.thread_time() - start_s)
    return best_s


def measure(family: str, settings: dict[str, Any], shape: tuple[int, ...], count: int, channels_last: bool) -> str:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    blocks: list[nn.Module] = []
    for seed in range(count):
        one = spec(family, settings, input_shape=shape, num_classes=10, seed=seed)
        blocks.append(cut_spec(one, 1).copy().blocks[0].eval().to(memory_format=layout))
    x = torch.randn(BATCH_SIZE, *shape, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=layout)
    # Side by side takes vectors or maps; a perceptron starts with a Flatten of maps.
    together = parallel(blocks, ndim=x.ndim, shared=True)

    def loop() -> Tensor:
        return torch.cat([block(x) for block in blocks], 1)

    with torch.inference_mode():
        loop_s = time_of(loop)
        if together is None:
            return f"| {loop_s * 1e3:8.1f} | {'-':>8} | {'-':>5} |"
        torch.testing.assert_close(together(x), loop(), rtol=1e-4, atol=1e-5)
        together_s = time_of(lambda: together(x))
    return f"| {loop_s * 1e3:8.1f} | {together_s * 1e3:8.1f} | {loop_s / together_s:5.2f} |"


def main() -> None:
    torch.set_num_threads(1)
    print(f"batch {BATCH_SIZE}, 1 thread, torch {torch.__version__}, least of {NUM_REPEATS}")
    print("| model              |  M | channels last | loop, ms | joined, ms | times faster |")
    print("|---|---|---|---|---|---|")
    for family, settings, shape in MODELS:
        for count in (5, 10):
            for channels_last in (False, True):
                row = measure(family, settings, shape, count, channels_last)
                name = f"{family} width {settings['width']}"
                print(f"| {name:18} | {count:2} | {'yes' if channels_last else 'no':13} {row}")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
