"""Milliseconds of a fused network on one batch: inference as it runs, all columns in one pass, and the plain loop."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor

from fedfuse.models import fused, spec
from fedfuse.models.blocks import cut_spec
from fedfuse.models.fused import Adaptor, Column, FusedBlocks, Level

MODELS: list[tuple[str, dict[str, Any], tuple[int, ...], int]] = [
    ("mlp", {"width": 128}, (1, 28, 28), 3),
    ("cnn", {"width": 16}, (1, 28, 28), 4),
    ("resnet", {"width": 8}, (3, 32, 32), 4),
    ("resnet", {"width": 16}, (3, 32, 32), 4),
]


def network(family: str, settings: dict[str, Any], shape: tuple[int, ...], num_blocks: int, count: int) -> FusedBlocks:
    specs = [spec(family, settings, input_shape=shape, num_classes=10, seed=seed) for seed in range(count)]
    pieces = [cut_spec(one, num_blocks).copy() for one in specs]
    levels = []
    for k in range(num_blocks):
        channels, ndim = pieces[0].interfaces[k - 1]
        adaptors = [Adaptor("conv1x1", [channels] * count, channels, ndim) if k else None for _ in pieces]
        levels.append(Level([Column(a, own.blocks[k]) for a, own in zip(adaptors, pieces, strict=True)]))
    return FusedBlocks(levels).eval()


@contextmanager
def way(name: str) -> Iterator[None]:
    # The ways that a level chooses between, and none of them.
    chooses, plain = fused.fastest_way, Level._is_plain
    if name != "chosen":
        fused.fastest_way = lambda blocks, x: name  # type: ignore[assignment, return-value]
    if name == "loop":
        Level._is_plain = lambda self, x: False  # type: ignore[method-assign]
    yield
    fused.fastest_way, Level._is_plain = chooses, plain  # type: ignore[method-assign]


def times_ms(runs: list[Callable[[], Tensor]], repeats: int) -> list[float]:
    # Time of the thread, not of the wall: other processes count less. In turns, and the least of several.
    best = [float("inf")] * len(runs)
    for repeat in range(repeats + 1):
        for i, run in enumerate(runs):
            start_s = time.thread_time()
            run()
            if repeat:
                best[i] = min(best[i], (time.thread_time() - start_s) * 1e3)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="*", default=sorted({family for family, *_ in MODELS}))
    parser.add_argument("--counts", nargs="*", type=int, default=[5, 10])
    parser.add_argument("--batch-sizes", nargs="*", type=int, default=[16, 128, 500])
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"1 thread, torch {torch.__version__}, least of {given.repeats}; ms")
    print("| model | M | batch | channels last | loop | plain | alone | joined | chosen | loop / chosen |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for family, settings, shape, num_blocks in MODELS:
        for count in given.counts if family in given.families else ():
            net = network(family, settings, shape, num_blocks, count)
            for batch_size in given.batch_sizes:
                for layout in (torch.contiguous_format, torch.channels_last)[: 1 if family == "mlp" else 2]:
                    net.to(memory_format=layout)  # type: ignore[call-overload]
                    x = torch.randn(batch_size, *shape).contiguous(memory_format=layout)

                    def run(name: str, net: FusedBlocks = net, x: Tensor = x) -> Tensor:
                        with way(name), torch.inference_mode():
                            return net(x)  # type: ignore[no-any-return]

                    names = ["loop", "plain", "alone", "joined", "chosen"]
                    ms = times_ms([lambda name=name, run=run: run(name) for name in names], given.repeats)  # type: ignore[misc]
                    cells = [f"{family} width {settings['width']}", count, batch_size]
                    cells += ["yes" if layout is torch.channels_last else "no", *(f"{value:.1f}" for value in ms)]
                    print("|", " | ".join(map(str, cells)), "|", f"{ms[0] / ms[-1]:.2f} |")
                    sys.stdout.flush()


if __name__ == "__main__":
    main()
