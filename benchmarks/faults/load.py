"""Load: a thousand clients with flat memory of the server. Two hundred nodes are tried by ``flower_network.py``."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

from federation import FEDAVG, changed, warm
from flower_network import LOAD_FAMILY
from outcome import NO_RUN, Seen, check, fault

MIB = 1 << 20


def federation(num_clients: int) -> dict[str, Any]:
    """One exchange of FedAvg with a model of about 1 MiB and very little data.

    Args:
        num_clients: how many.
    """
    return changed(
        FEDAVG,
        {
            "data": {
                "source": "digits",
                "validation_fraction": 0.0,
                "test_limit": 100,
                "partition": {"scheme": "iid", "num_clients": num_clients},
            },
            "model": {"family": "mlp", "width": 450, "depth": 3},
            "method.local": {"num_epochs": 1, "batch_size": 32},
        },
    )


def peaks(num_clients: int, folder: Path) -> tuple[int, int, float]:
    """Run a federation in a process of its own.

    Args:
        num_clients: how many.
        folder: of the run.

    Returns:
        Most resident memory that the process added, bytes of all uploads, seconds.
    """
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        import fedfuse
        from fedfuse.core import client

        client.reset_peak_rss()
        before = client.peak_rss_bytes()
        # Each task measures its own peak, which would make us forget ours.
        client.reset_peak_rss = lambda: None
        result = fedfuse.run(federation(num_clients), out=folder)
        facts = [client.peak_rss_bytes() - before, result.ledger["upload_bytes_total"], result.ledger["wall_seconds"]]
        with os.fdopen(writing, "w") as pipe:
            json.dump(facts, pipe)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        text = pipe.read()
    os.waitpid(pid, 0)
    check(text, "the run failed")
    rise, num_bytes, seconds = json.loads(text)
    return int(rise), int(num_bytes), float(seconds)


@fault(LOAD_FAMILY, "1,000 clients in simulation")
def thousand(home: Path) -> Seen:
    """FedAvg over 100 and over 1,000 clients of 1.6 MiB each: the server's memory must not grow with them."""
    warm()
    few, few_bytes, _ = peaks(100, home / "few")
    shutil.rmtree(home / "few")
    many, many_bytes, seconds = peaks(1000, home / "many")
    check(many_bytes > 9 * few_bytes, "the uploads did not grow")
    check(many - few < 0.1 * (many_bytes - few_bytes), f"{few / MIB:.0f} MiB, then {many / MIB:.0f} MiB")
    return Seen(
        f"{few_bytes / MIB:,.0f} and {many_bytes / MIB:,.0f} MiB of uploads from 100 and 1,000 clients: the process "
        f"rose by {few / MIB:.0f} and {many / MIB:.0f} MiB; {seconds:.0f} s for the thousand, their training included",
        NO_RUN,
    )
