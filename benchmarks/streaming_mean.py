"""Fusing many large uploads by the mean: memory of a fresh process, and speed beside reading alone.

Makes the files in a temporary folder, fuses them in a process of its own, and prints its peak of resident memory and
its bytes per second beside a plain sequential read of the same files and an addition of as many bytes from memory. They
run in turn, so that a busy machine slows them alike; the mean and the addition use the same number of threads.

    python benchmarks/streaming_mean.py [--uploads 50] [--megabytes 100] [--threads N]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fedfuse.core.payload import Payload, PayloadFile
from fedfuse.rules import fuse_uploads
from fedfuse.rules.mean import Mean

_BLOCK_BYTES = 1 << 20


def make(folder: Path, num_uploads: int, megabytes: int) -> list[Path]:
    """Write uploads of ten equal float32 tensors."""
    paths = []
    for number in range(num_uploads):
        generator = torch.Generator().manual_seed(number)
        size = megabytes * 1_000_000 // 40
        tensors = {f"model/{k}": torch.rand(size, generator=generator) for k in range(10)}
        paths.append(folder / f"{number:04}.safetensors")
        paths[-1].write_bytes(Payload(tensors).encode())
    return paths


def fuse(paths: list[Path]) -> None:
    """The mean, as a method runs it."""
    fuse_uploads([PayloadFile(path) for path in paths], Mean(), list(range(1, len(paths) + 1)))


def read(paths: list[Path]) -> None:
    """Every byte of every file, one after the other."""
    buffer = bytearray(_BLOCK_BYTES)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def add(paths: list[Path]) -> None:
    """As many bytes, added from memory to a total of the same size and precision."""
    size = paths[0].stat().st_size // 4
    total, values = torch.zeros(size), torch.ones(size)
    for _ in paths:
        total.add_(values)


WORK: dict[str, Callable[[list[Path]], None]] = {"mean": fuse, "plain read": read, "add in memory": add}


def peak_kib() -> int:
    """Most resident memory of this process so far, mapped files counted in.

    Not ``ru_maxrss``: that begins with the memory of the process that started this one.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]


def child(what: str, folder: Path, num_threads: int) -> None:
    """Do one kind of work in this process and print what it took."""
    torch.set_num_threads(num_threads)
    paths = sorted(folder.glob("*.safetensors"))
    before = peak_kib()
    start = time.perf_counter()
    WORK[what](paths)
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "before_kib": before, "peak_kib": peak_kib()}))


def measured(what: str, folder: Path, num_threads: int) -> dict[str, float]:
    """Run one kind of work in a fresh process."""
    command = [sys.executable, __file__, "--child", what, "--folder", str(folder), "--threads", str(num_threads)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": str(num_threads)}
    )
    facts: dict[str, float] = json.loads(done.stdout)
    return facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--uploads", type=int, default=50)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--folder", type=Path, help="where the files are made; a temporary folder if left out")
    parser.add_argument("--child", choices=list(WORK), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child, arguments.folder, arguments.threads)
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        total = sum(path.stat().st_size for path in make(folder, arguments.uploads, arguments.megabytes))
        runs: dict[str, list[dict[str, float]]] = {what: [] for what in WORK}
        for _ in range(arguments.repeats):
            for what in WORK:
                runs[what].append(measured(what, folder, arguments.threads))
    print(f"{arguments.uploads} uploads of {arguments.megabytes} MB, {arguments.threads} threads")
    print(f"{arguments.repeats} runs, median (min to max)")
    speeds = {}
    for what, found in runs.items():
        rates = [total / run["seconds"] / 1e9 for run in found]
        speeds[what] = statistics.median(rates)
        peak = max(run["peak_kib"] for run in found) / 1024
        before = max(run["before_kib"] for run in found) / 1024
        print(
            f"{what:<14} {speeds[what]:6.2f} GB/s ({min(rates):.2f} to {max(rates):.2f})   "
            f"peak RSS {peak:6.0f} MiB, {before:.0f} of it before the work"
        )
    lowest = min(speeds["plain read"], speeds["add in memory"])
    print(f"mean at {100 * speeds['mean'] / lowest:.0f} % of the lower of the two others")


if __name__ == "__main__":
    main()
