"""Orchestration overhead: what an exchange costs beside training and evaluation.

100 clients on digits with a small mlp in one process, with the journal on disk. Everything that is not inside the
training loop or its evaluation counts as overhead: building the model, encoding, checking, journal with fsync, ledger.

    python benchmarks/orchestration.py [--clients 100] [--repeats 5]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch

import fedfuse
from fedfuse.methods import tasks


def measure(num_clients: int) -> tuple[float, float]:
    """Run once.

    Returns:
        Milliseconds of overhead per client and exchange, and the same with every answer in the journal.
    """
    spent = 0.0
    original = tasks.train

    def timed(*args: Any, **kwargs: Any) -> Any:
        nonlocal spent
        start = time.perf_counter()
        try:
            return original(*args, **kwargs)
        finally:
            spent += time.perf_counter() - start

    config = {
        "data": {"source": "digits", "partition": {"scheme": "iid", "num_clients": num_clients}},
        "model": {"family": "mlp", "width": 32, "depth": 2},
        "method": {"name": "fedavg", "local": {"num_epochs": 1, "batch_size": 32}},
        "runtime": {"name": "local", "workers": 1},
        "server": {"threads": 1},
    }
    tasks.train = timed
    try:
        with tempfile.TemporaryDirectory() as folder:
            results = []
            for _ in range(2):
                spent = 0.0
                result = fedfuse.run(config, out=folder)
                fuse_s = result.ledger["wall_seconds"]
                results.append((fuse_s - spent) * 1000 / num_clients)
    finally:
        tasks.train = original
    return results[0], results[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    measure(10)
    runs = [measure(arguments.clients) for _ in range(arguments.repeats)]
    for name, column in (("asked", 0), ("from the journal", 1)):
        values = [run[column] for run in runs]
        print(
            f"{name:<18} {statistics.median(values):6.2f} ms per client and exchange "
            f"(min {min(values):.2f}, max {max(values):.2f}, {arguments.clients} clients, {arguments.repeats} runs)"
        )


if __name__ == "__main__":
    main()
