"""Whether a comparison trains every client once: its wall time beside local training and the server's own work.

Eight methods that fuse the same local models, on digits (or MNIST where it is at hand), in one process with the journal
on disk. Printed is (wall time - the methods' own server time) / local training: 1 is the least there can be.

    python benchmarks/comparing.py [--epochs 20] [--mnist FOLDER]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from fedfuse import experiment

METHODS = (
    "fedavg,ensemble,ensemble[combine=vote],merge[rule=ties],merge[rule=slerp],fedma,otfusion,"
    "feddf[data=noise,num_passes=2]"
)


def measure(num_epochs: int, mnist: str) -> tuple[float, float, float, list[tuple[str, float]]]:
    """Compare once.

    Returns:
        Seconds in all, of local training, of the methods' own server work, and the latter by method.
    """
    data: dict[str, Any] = (
        {"source": "parquet", "path": mnist, "limit": 5000, "test_limit": 2000} if mnist else {"source": "digits"}
    )
    config = {
        "data": {**data, "partition": {"scheme": "dirichlet", "num_clients": 5, "dirichlet_alpha": 0.5}},
        "model": {"family": "cnn", "width": 16},
        "method": {"name": "fedavg", "local": {"num_epochs": num_epochs}},
        "runtime": {"name": "local", "workers": 1},
        "server": {"threads": 1},
    }
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        board = experiment.compare(config, METHODS, out=Path(folder) / "board")
        wall_s = time.perf_counter() - start
    # Answers from the journal cost nothing, so the first method alone has the time of local training.
    training_s = max(row["client_seconds"] for row in board["rows"])
    servers = [(str(row["method"]), float(row["server_seconds"])) for row in board["rows"]]
    return wall_s, training_s, sum(seconds for _, seconds in servers), servers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--mnist", default="", help="folder of MNIST's parquet files; digits if left out")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    wall_s, training_s, server_s, servers = measure(arguments.epochs, arguments.mnist)
    for name, seconds in servers:
        print(f"{name:<34} {seconds:7.2f} s server")
    print(f"{'all methods, wall':<34} {wall_s:7.2f} s")
    print(f"{'local training, once':<34} {training_s:7.2f} s")
    print(f"{'(wall - server) / local training':<34} {(wall_s - server_s) / training_s:7.2f}")


if __name__ == "__main__":
    main()
