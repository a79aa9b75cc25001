"""``fedfuse certs``: certificates and keys, and what to hand to whom."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedfuse.core.errors import ConfigError


def make(folder: Path, clients: Sequence[str], hosts: Sequence[str], *, valid_days: int) -> str:
    """Make what is not there yet, and say what to do with it.

    Args:
        folder: where.
        clients: names of new clients.
        hosts: names and addresses that clients reach the server by.
        valid_days: how long certificates hold.

    Returns:
        Lines for the operator.

    Raises:
        ConfigError: nothing is to be made, or something cannot be made.
    """
    from fedfuse.runtimes.flower.processes import check_flower

    check_flower()
    from fedfuse.runtimes.flower.certificates import make_certificates
    from fedfuse.runtimes.flower.trust import SIGNING_SUFFIX

    if not clients and not hosts:
        raise ConfigError(
            "nothing is to be made", where="fedfuse certs", fix="give --clients hospital-a,hospital-b and --host HOST"
        )
    make_certificates(folder, clients, hosts, valid_days=valid_days)
    lines = [f"{folder}: certificates and keys for a trial; whoever reads the .key files can speak in their name"]
    for name in clients:
        key = f"{name}.key"
        lines.append(
            f"to {name}, and to nobody else: the folder {folder / name} (ca.pem, {key}, {key}{SIGNING_SUFFIX})"
        )
    host = hosts[0] if hosts else "HOST"
    lines.append(
        f"on the server:  fedfuse serve federation.yaml --address 0.0.0.0:9092 --certs {folder} --out runs/first"
    )
    who = clients[0] if clients else "NAME"
    lines.append(
        f"at {who}:  fedfuse join --server {host}:9092 --name {who} --data FILE --ca ca.pem --key {who}.key --preview"
    )
    return "\n".join(lines)
