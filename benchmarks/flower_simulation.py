"""Flower's simulation engine beside the local runtime: what a client costs in an exchange, and the server's memory.

10, 100 and 1,000 clients on digits with a small mlp, fedavg of three rounds, the journal on disk, everything on this
machine with one process per core. Each case runs in a process of its own. The first exchange is told apart from the
others: processes that Ray has just started load torch and fedfuse in it. The server's memory is what its process holds
at most above what it holds when all data are in memory and the run begins.

    python benchmarks/flower_simulation.py [--clients 10 100 1000] [--width 32]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

RUNTIMES = ("local", "flower-simulation")
NUM_ROUNDS = 3
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


@contextmanager
def watched_memory() -> Iterator[list[int]]:
    """Look at this process's memory every 20 ms; the list holds the largest and the first value."""
    seen, done = [rss_bytes(), rss_bytes()], threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            seen[0] = max(seen[0], rss_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def measure(runtime: str, num_clients: int, width: int) -> dict[str, float]:
    """Run once in this process."""
    import fedfuse
    from fedfuse.core.cohort import Cohort
    from fedfuse.core.registry import RUNTIMES as KNOWN
    from fedfuse.experiment import running

    waits, opened, before = [], [], []
    ask, start_runtime = Cohort.ask, running._open_runtime

    def timed_ask(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        replies = ask(*args, **kwargs)
        waits.append(time.perf_counter() - start)
        return replies

    def timed_open(*args: Any, **kwargs: Any) -> Any:
        before.append(rss_bytes())
        start = time.perf_counter()
        found = start_runtime(*args, **kwargs)
        opened.append(time.perf_counter() - start)
        return found

    KNOWN.names()
    Cohort.ask, running._open_runtime = timed_ask, timed_open  # type: ignore[method-assign]
    config = {
        "data": {
            "source": "digits",
            "partition": {"scheme": "iid", "num_clients": num_clients},
            "validation_fraction": 0.0,
        },
        "model": {"family": "mlp", "width": width, "depth": 2},
        "method": {"name": "fedavg", "num_rounds": NUM_ROUNDS, "local": {"num_epochs": NUM_ROUNDS, "batch_size": 32}},
        "runtime": {"name": runtime},
        "server": {"threads": 1},
    }
    with tempfile.TemporaryDirectory() as folder, watched_memory() as seen:
        start = time.perf_counter()
        result = fedfuse.run(config, out=folder)
        whole_s = time.perf_counter() - start
    later_s = sum(waits[1:]) / (len(waits) - 1)
    return {
        "open_s": opened[0],
        "first_s": waits[0],
        "later_ms": later_s * 1000 / num_clients,
        "task_ms": result.ledger["client_seconds"] * 1000 / num_clients / len(waits),
        "whole_s": whole_s,
        "grown_bytes": seen[0] - before[0],
        "upload_bytes_total": result.ledger["upload_bytes_total"],
        "digest": int(result.facts["artifact"]["digest"][:12], 16),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        torch.set_num_threads(1)
        print(json.dumps(measure(arguments.case, arguments.clients[0], arguments.width)))
        return
    print("| clients | runtime | start s | first exchange s | later, ms per client | of that in the task, ms "
          "| server memory, MiB | uploads, MiB |")  # fmt: skip
    print("|---:|---|---:|---:|---:|---:|---:|---:|")
    for num_clients in arguments.clients:
        digests = set()
        for runtime in RUNTIMES:
            command = [sys.executable, __file__, "--case", runtime, "--clients", str(num_clients)]
            command += ["--width", str(arguments.width)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
            seen = json.loads(done.stdout.splitlines()[-1])
            digests.add(seen["digest"])
            print(
                f"| {num_clients:,} | `{runtime}` | {seen['open_s']:.1f} | {seen['first_s']:.1f} "
                f"| {seen['later_ms']:.2f} | {seen['task_ms']:.2f} | {seen['grown_bytes'] / 2**20:.0f} "
                f"| {seen['upload_bytes_total'] / 2**20:.0f} |",
                flush=True,
            )
        if len(digests) != 1:
            sys.exit("the runtimes do not agree")


if __name__ == "__main__":
    main()
