"""A simulation, Ray, files by hand, and a real SuperLink with five SuperNodes over TLS give the very same model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import fedfuse
from fedfuse.commands.serving import Federation
from fedfuse.commands.serving_screen import ServingLive
from fedfuse.commands.splitting import split
from fedfuse.commands.status import read_status
from fedfuse.core.journal import Journal
from fedfuse.experiment import read_config
from fedfuse.experiment.contributing import contribute
from fedfuse.experiment.inbox import fuse_inbox
from fedfuse.runtimes.flower.certificates import make_certificates
from fedfuse.runtimes.flower.hosting import HostedRun, SuperLink
from fedfuse.runtimes.flower.processes import free_port
from fedfuse.runtimes.flower.trust import check_server_files

pytestmark = [
    pytest.mark.slow,
    pytest.mark.xdist_group("deployment"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

NAMES = [f"client_{i}" for i in range(5)]
METHODS: dict[str, dict[str, Any]] = {
    "fusefl": {"name": "fusefl", "num_blocks": 4, "local": {"num_epochs": 4}},
    "fedavg": {"name": "fedavg", "local": {"num_epochs": 1}},
}


def config(method: str) -> dict[str, Any]:
    return {
        "seed": 3,
        "data": {
            "source": "digits",
            "limit": 300,
            "test_limit": 100,
            "partition": {"scheme": "dirichlet", "num_clients": 5, "dirichlet_alpha": 0.5},
        },
        "model": {"family": "cnn", "width": 4},
        "method": METHODS[method],
        "runtime": {"name": "local", "workers": 1},
        "server": {"threads": 1},
    }


@dataclass
class Deployment:
    """What runs.

    Args:
        superlink: the server.
        certs: certificates and keys.
        folder: for everything else.
        clients: the process that answers for all five.
    """

    superlink: SuperLink
    certs: Path
    folder: Path
    clients: subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("deployment")
    certs, port = folder / "certs", free_port()
    make_certificates(certs, NAMES, ["localhost"])
    for method in METHODS:
        split(read_config(config(method)), folder / method)
    superlink = SuperLink(folder / "superlink", "127.0.0.1", port, check_server_files(certs))
    program = [sys.executable, str(Path(__file__).with_name("flower_clients.py")), f"localhost:{port}"]
    data = [f"{name}={folder / 'fedavg' / name}.npz" for name in NAMES]
    with (folder / "clients.log").open("wb") as log:
        superlink.start()
        superlink.allow_only(Federation.of(read_config(config("fedavg")), folder, certs).node_keys)
        clients = subprocess.Popen(
            [*program, str(certs), str(folder / "homes"), *data], stdout=log, stderr=subprocess.STDOUT
        )
        try:
            yield Deployment(superlink, certs, folder, clients)
        finally:
            clients.terminate()
            clients.wait(30)
            superlink.stop()


def test_the_digests_are_those_of_the_simulation(deployment: Deployment) -> None:
    for method in METHODS:
        folder = deployment.folder / method
        real = read_config(folder / "federation.yaml", ["federation.timeout_s=120"])
        run = folder / "run"
        with HostedRun(deployment.superlink) as hosted:
            result = Federation.of(real, run, deployment.certs).fuse(hosted.grid, ServingLive(run))
        local = fedfuse.run(config(method))
        assert deployment.clients.poll() is None, (deployment.folder / "clients.log").read_text()
        assert result.missing == {}
        assert result.artifact is not None
        assert local.artifact is not None
        assert result.artifact.digest() == local.artifact.digest()
        status = read_status(run)
        assert status.is_over
        assert [line.name for line in status.clients] == NAMES
        assert all(line.wire_bytes > sum(num_bytes for _, num_bytes in line.sent.values()) for line in status.clients)


def by_hand(folder: Path) -> str:
    """The digest of a federation whose messages are files."""
    real, run = read_config(folder / "federation.yaml"), folder / "by_hand"
    request = None
    for exchange in range(10):
        for name in NAMES:
            place = str(folder / "inbox" / f"{exchange}_{name}.fed")
            asked = None if request is None else str(request)
            contribute(real, name, folder / f"{name}.npz", out=place, home=folder / "hands" / name, request=asked)
        found = fuse_inbox([str(folder / "inbox")], real, run)
        if found.result is not None:
            return str(found.result.facts["artifact"]["digest"])
        request = found.request
    raise AssertionError("no end")


@pytest.mark.parametrize("method", METHODS)
def test_neither_ray_nor_hands_change_a_bit(deployment: Deployment, method: str) -> None:
    local, ray = (
        fedfuse.run({**config(method), "runtime": {"name": name}}).facts["artifact"]["digest"]
        for name in ("local", "flower-simulation")
    )
    assert by_hand(deployment.folder / method) == ray == local


def test_a_secure_sum_is_the_model_of_the_simulation_and_all_that_the_server_has(deployment: Deployment) -> None:
    secure = ["federation.timeout_s=120", "federation.secure_aggregation={}"]
    real, run = read_config(deployment.folder / "fedavg" / "federation.yaml", secure), deployment.folder / "secure"
    with HostedRun(deployment.superlink) as hosted:
        result = Federation.of(real, run, deployment.certs).fuse(hosted.grid, ServingLive(run))
    local = fedfuse.run(config("fedavg"))
    assert result.missing == {}
    assert result.artifact is not None
    assert local.artifact is not None
    have, want = dict(result.artifact.state), dict(local.artifact.state)
    assert list(have) == list(want)
    for key, tensor in want.items():
        # The sum is one of fixed-point numbers.
        torch.testing.assert_close(have[key], tensor, rtol=1e-5, atol=1e-6)
    with Journal(run / "journal") as journal:
        (entry,) = journal.entries()
    assert entry.facts["client"] == "sum"
