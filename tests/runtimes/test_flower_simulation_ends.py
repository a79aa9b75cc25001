"""How a simulation on Flower's engine ends: while clients are at work, by Ctrl-C, by a kill; each starts Ray anew."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from simulated_clients import CONFIG, ask, digits_setting, nothing_is_left, own_method, ray_processes, sides_of

from fedfuse.experiment.setting import Setting
from fedfuse.runtimes.flower.leftovers import processes_of
from fedfuse.runtimes.flower.simulation import FlowerSimulation

pytest.importorskip("flwr")
pytest.importorskip("ray")


pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True, scope="module")
def _nothing_is_left() -> Iterator[None]:
    with nothing_is_left():
        yield


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with own_method(tmp_path_factory.mktemp("own_code")) as found:
        yield found


@pytest.fixture(scope="module")
def setting() -> Setting:
    return digits_setting()


def test_it_ends_while_clients_are_at_work_and_starts_again(
    setting: Setting, toy: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for number in range(2):
        runtime = FlowerSimulation(cpus=1).open(sides_of(setting, tmp_path))
        assert len(ask(runtime, setting, toy(), f"fine_{number}")) == 5
        assert len(ray_processes()) > 2
        threading.Timer(2.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        with pytest.raises(KeyboardInterrupt):
            ask(runtime, setting, toy(mode="forever"), f"busy_{number}")
        start = time.monotonic()
        runtime.close()
        assert time.monotonic() - start < 60
        assert ray_processes() == []
        runtime.close()
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_a_run_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    config = {**CONFIG, "method": {"name": "fedavg", "local": {"num_epochs": 100000}}}
    script = f"import fedfuse; fedfuse.run({ {**config, 'runtime': {'name': 'flower-simulation'}}!r})"
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", script], cwd=tmp_path, env=environment)
    deadline = time.monotonic() + 90
    while not list(tmp_path.glob("fedfuse-spool-*/tried/*")) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert len(processes_of(process.pid)) > 2
    assert process.poll() is None
    process.kill()
    process.wait()
    deadline, since = time.monotonic() + 30, time.monotonic()
    # One that was just being started when its parent was killed may show up for a moment.
    while time.monotonic() < min(deadline, since + 2):
        if processes_of(process.pid):
            since = time.monotonic()
        time.sleep(0.1)
    assert processes_of(process.pid) == []
    while list(tmp_path.glob("fedfuse-spool-*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert list(tmp_path.glob("fedfuse-spool-*")) == []
