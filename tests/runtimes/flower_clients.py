"""Several clients of a real deployment in one process: a SuperNode each, and their messages carried out in forks.

Started as a program: ``flower_clients.py SERVER CERTS HOME NAME=FILE NAME=FILE ...``.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from fedfuse.commands.consent import Consent
from fedfuse.commands.joining import Joining, _load_what_training_needs, make_node
from fedfuse.core.sealing import SigningKey
from fedfuse.experiment.contributing import own_data
from fedfuse.runtimes.flower.executing import Executor, SuperNode
from fedfuse.runtimes.flower.processes import sigterm_interrupts


def main() -> None:
    """Answer until the process is ended."""
    server, certs, home = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    executors, supernodes = [], []
    for text in sys.argv[4:]:
        name, file = text.split("=")
        keys = certs / name
        joining = Joining(server, name, Path(file), home=home / name, ca=keys / "ca.pem", key=keys / f"{name}.key")
        signing = SigningKey.load(keys / f"{name}.key.signing")
        node = make_node(joining, signing, own_data(None, name, Path(file)), Consent(joining.folder))
        supernodes.append(SuperNode(joining.folder / "flower", server, joining.ca, joining.key, name))
        supernodes[-1].start()
        executors.append(Executor(node, supernodes[-1]))
    _load_what_training_needs()
    try:
        with sigterm_interrupts():
            while all(supernode.is_running for supernode in supernodes):
                moves = [executor.step() for executor in executors]
                if not any(moves):
                    time.sleep(0.3)
    except KeyboardInterrupt:
        pass
    finally:
        for executor in executors:
            executor.close()
        for supernode in supernodes:
            supernode.child.kill()  # type: ignore[union-attr]


if __name__ == "__main__":
    main()
