"""Flower's simulation engine: the same bits as the local runtime, and no client or process takes the others down."""

from __future__ import annotations

import dataclasses
import importlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from simulated_clients import CONFIG, ask, digits_setting, nothing_is_left, own_method, sides_of
from torch import nn

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.client import ClientSide, StateStore
from fedfuse.core.cohort import Cohort, Terms
from fedfuse.core.errors import ConfigError, QuorumError, TaskError
from fedfuse.core.examples import ClientData, Examples
from fedfuse.core.method import Method, client_task, register_method
from fedfuse.core.payload import Payload
from fedfuse.core.registry import METHODS, RECIPES, RUNTIMES
from fedfuse.experiment.configuration import NamedSection, named, read_config, resolve
from fedfuse.experiment.result import Observer, Result
from fedfuse.experiment.running import run_method
from fedfuse.experiment.setting import Setting
from fedfuse.runtimes.flower.leftovers import guarded, processes_of
from fedfuse.runtimes.flower.simulation import FlowerSimulation, FlowerSimulationRuntime
from fedfuse.runtimes.flower.spool import Spool, find_method, module_of

pytest.importorskip("flwr")
pytest.importorskip("ray")

# One process runs all of them: the engine takes seconds to start.
pytestmark = pytest.mark.xdist_group("ray")

LOCAL = {"num_epochs": 4, "batch_size": 32}
METHOD_SECTIONS = {
    "fusefl": {"name": "fusefl", "num_blocks": 4, "local": LOCAL},
    "fedavg": {"name": "fedavg", "local": LOCAL},
}
IDS = [f"client_{number}" for number in range(5)]


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


@pytest.fixture(scope="module")
def engine(setting: Setting, toy: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[FlowerSimulationRuntime]:
    """One engine for all that does not end it: Ray takes its time to start."""
    runtime = FlowerSimulation().open(sides_of(setting, tmp_path_factory.mktemp("states")))
    yield runtime
    runtime.close()


def run(setting: Setting, method: str, runtime: Any = None) -> Result:
    section = METHOD_SECTIONS[method]
    config = read_config({**CONFIG, "method": section, "runtime": {"name": "local", "workers": 1}})
    others = NamedSection(**section).others
    built: Method = named(METHODS, method, others, "method")
    return run_method(
        setting, built, config, resolve(config), label=method, folder=None, observer=Observer(), runtime=runtime
    )


# --- the same bits


@pytest.mark.parametrize("method", METHOD_SECTIONS)
def test_the_digest_is_the_local_one(engine: FlowerSimulationRuntime, setting: Setting, method: str) -> None:
    local, simulated = run(setting, method), run(setting, method, engine)
    assert local.artifact is not None
    assert simulated.artifact is not None
    assert simulated.artifact.digest() == local.artifact.digest()
    assert simulated.accuracy == local.accuracy
    assert simulated.missing == {}
    wire = "upload_wire_bytes_total", "download_wire_bytes_total"
    same = {key for key in local.ledger if key.endswith(("bytes_total", "exchanges"))} - set(wire)
    assert {key: simulated.ledger[key] for key in same} == {key: local.ledger[key] for key in same}
    for key in wire:
        assert simulated.ledger[key] > simulated.ledger[key.replace("_wire", "")]


def test_clients_are_those_of_the_setting(engine: FlowerSimulationRuntime, setting: Setting) -> None:
    facts = engine.clients()
    assert list(facts) == IDS
    assert {name: (f.fingerprint, f.num_threads, f.device) for name, f in facts.items()} == {
        name: (data.fingerprint, 1, "cpu") for name, data in setting.data.clients.items()
    }


# --- faults


def test_state_threads_and_bf16_cross(engine: FlowerSimulationRuntime, setting: Setting, toy: Any) -> None:
    cohort = Cohort(runtime=engine, method=toy(), model_of=lambda _: setting.model, seed=1)
    for number in (1, 2):
        replies = cohort.ask(toy.work, Payload({"w/x": torch.ones(64, 64)}), key=f"state_{number}")
        assert [payload["n"] for payload in replies.values()] == [number] * 5
        assert {payload["threads"] for payload in replies.values()} == {1}
        assert {payload.tensor("w/x").dtype for payload in replies.values()} == {torch.bfloat16}


def test_a_failing_client_is_missing(engine: FlowerSimulationRuntime, setting: Setting, toy: Any) -> None:
    replies = ask(engine, setting, toy(mode="fails"), "fails", terms=Terms(quorum=0.5))
    assert sorted(replies) == [name for name in IDS if name != "client_1"]
    assert replies.missing["client_1"].startswith("ZeroDivisionError: no luck (simulated_toy.py:")


def test_below_the_quorum_the_run_stops(engine: FlowerSimulationRuntime, setting: Setting, toy: Any) -> None:
    with pytest.raises(QuorumError, match=r'4 of 5 clients answered the exchange "few", 5 are needed \(client_1: Zero'):
        ask(engine, setting, toy(mode="fails"), "few")


def test_a_task_that_breaks_the_contract_stops_the_run(
    engine: FlowerSimulationRuntime, setting: Setting, toy: Any
) -> None:
    with pytest.raises(TaskError) as error:
        ask(engine, setting, toy(mode="breaks"), "breaks")
    assert error.value.what.startswith('the task "work" uploads "secret" that it did not declare')
    # What the others had answered to that is nobody's any more, and disturbs no later exchange.
    assert len(ask(engine, setting, toy(), "after")) == 5


def test_a_process_that_dies_and_one_that_hangs_cost_their_clients_only(
    engine: FlowerSimulationRuntime, setting: Setting, toy: Any
) -> None:
    replies = ask(engine, setting, toy(mode="both"), "both", terms=Terms(quorum=0.5, timeout_s=2.0))
    assert replies.missing == {"client_1": "its process died", "client_3": "no reply within 2 s"}
    assert sorted(replies) == ["client_0", "client_2", "client_4"]
    # The dead processes are replaced.
    assert len(ask(engine, setting, toy(), "again")) == 5


def test_a_method_of_the_running_script_is_refused(
    engine: FlowerSimulationRuntime, setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class InScript(Method):
        @client_task(uploads=("n",))
        def work(self, client: Any, msg: Payload) -> Payload:
            return Payload({"n": 1})

    InScript.__module__ = "__main__"
    register_method("in_script")(InScript)
    try:
        with pytest.raises(ConfigError) as error:
            ask(engine, setting, InScript(), "script")
    finally:
        del METHODS._entries["in_script"], METHODS._facts["in_script"]
    assert str(error.value) == textwrap.dedent("""\
        the method "in_script" is defined in the running script, which Ray's processes cannot import
          where: runtime
          fix:   move it into a module of its own and import it, or use runtime: {name: local}""")


def test_a_second_engine_at_the_same_time_is_refused(
    engine: FlowerSimulationRuntime, setting: Setting, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError) as error:
        FlowerSimulation().open(sides_of(setting, tmp_path))
    assert error.value.what == "Ray is already running in this program"
    assert error.value.fix == "call ray.shutdown() before the run"
    assert list(engine.clients()) == IDS


# --- the end


def test_only_rays_parting_words_are_taken_out(capfd: pytest.CaptureFixture[str]) -> None:
    from fedfuse.runtimes.flower import engine

    print("before", file=sys.stderr)
    with engine._without_parting_words():
        os.write(2, b"[2026 E] task_manager.cc:1: Failed to push error to driver for task 80\n")
        print("another thread's", file=sys.stderr)
    print("after", file=sys.stderr)
    assert capfd.readouterr().err == "before\nanother thread's\nafter\n"


def test_what_a_killed_program_leaves_is_cleaned_up(tmp_path: Path) -> None:
    data = tmp_path / "spool"
    data.mkdir()
    code = f"""
        import os, subprocess, sys
        from pathlib import Path
        from fedfuse.runtimes.flower import leftovers
        ray = leftovers.ray_folder()
        marked = subprocess.Popen(["sleep", "60"], env={{leftovers.MARK: str(os.getpid())}})
        titled = subprocess.Popen(["sleep", "60"], env={{}}, stdout=(ray / "log").open("w"))
        with leftovers.guarded(Path({str(data)!r})):
            assert leftovers.processes_of(os.getpid()) == sorted([marked.pid, titled.pid])
            print(ray, os.getpid(), flush=True)
            os.kill(os.getpid(), 9)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    ray, program = done.stdout.split()
    deadline = time.monotonic() + 20
    while (data.exists() or Path(ray).exists()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_of(int(program)) == []
    assert not data.exists()
    assert not Path(ray).exists()


def test_a_guard_goes_with_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "spool"
    folder.mkdir()
    with guarded(folder):
        assert folder.exists()
    assert not folder.exists()


# --- settings


@pytest.mark.parametrize(
    ("settings", "what", "where"),
    [
        ({"client_threads": 0}, "client_threads is 0", "runtime.client_threads"),
        ({"cpus": 0}, "cpus is 0", "runtime.cpus"),
        ({"cpus_per_client": 0.0}, "cpus_per_client is 0", "runtime.cpus_per_client"),
        ({"cpus_per_client": float("nan")}, "cpus_per_client is nan", "runtime.cpus_per_client"),
        ({"gpus_per_client": -1.0}, "gpus_per_client is -1", "runtime.gpus_per_client"),
        ({"gpus_per_client": 1.5}, "gpus_per_client is 1.5", "runtime.gpus_per_client"),
        ({"device": "cuda"}, "clients on cuda have no GPU", "runtime.gpus_per_client"),
        ({"device": "cpu", "gpus_per_client": 0.5}, "clients on the cpu take 0.5 GPUs", "runtime.device"),
        (
            {"cpus": 1, "cpus_per_client": 2.0},
            "a client wants 2 cores, and 1 are to be used",
            "runtime.cpus_per_client",
        ),
        (
            {"cpus": 1, "client_threads": 3},
            "a client wants 3 cores, and 1 are to be used",
            "runtime.cpus_per_client",
        ),
        (
            {"address": "head:6379", "cpus": 2, "spool": "/shared"},
            "cpus is for this machine, and address names a cluster",
            "runtime.cpus",
        ),
        ({"address": "head:6379"}, "clients' data has no way to the cluster", "runtime.spool"),
    ],
)
def test_settings_that_make_no_sense(settings: Mapping[str, Any], what: str, where: str) -> None:
    with pytest.raises(ConfigError) as error:
        FlowerSimulation(**settings)
    assert (error.value.what, error.value.where) == (what, where)


def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError) as error:
        FlowerSimulation(gpus_per_client=2)
    assert error.value.what == "a client wants 2 GPUs, and this machine has 1"
    assert FlowerSimulation(gpus_per_client=0.25).client_device() == torch.device("cuda")
    assert FlowerSimulation().client_device() == torch.device("cpu")


def test_a_cluster_has_its_own_gpus() -> None:
    settings = FlowerSimulation(address="head:6379", spool="/shared", gpus_per_client=0.5)
    assert settings.client_device() == torch.device("cuda")


def test_a_client_that_fits_no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedfuse.runtimes.flower import engine

    machines = [
        {"Alive": True, "Resources": {"CPU": 3.0, "GPU": 1.0}},
        {"Alive": True, "Resources": {"CPU": 4.0}},
        {"Alive": False, "Resources": {"CPU": 64.0}},
    ]
    monkeypatch.setattr(engine.ray, "nodes", lambda: machines)
    assert engine.num_that_fit(2.0, 0.0) == 3
    assert engine.num_that_fit(1.0, 0.25) == 3
    with pytest.raises(ConfigError) as error:
        engine.num_that_fit(5.0, 0.0)
    assert error.value.what == "no client fits: one needs 5 CPUs and 0 GPUs, Ray has 7 and 1"
    assert error.value.fix == "lower runtime.cpus_per_client or runtime.gpus_per_client"


def test_a_cluster_that_is_not_there() -> None:
    from fedfuse.runtimes.flower import engine

    engine.check_reachable("auto")
    engine.check_reachable("ray://head:10001")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        with pytest.raises(ConfigError) as error:
            engine.check_reachable(f"127.0.0.1:{port}")
        assert error.value.what == "the Ray cluster cannot be reached: [Errno 111] Connection refused"
        server.listen()
        engine.check_reachable(f"127.0.0.1:{port}")


def test_it_is_registered_and_needs_its_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    assert RUNTIMES.get("flower-simulation") is FlowerSimulation
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "ray" else real(name))
    with pytest.raises(ConfigError) as error:
        FlowerSimulation().open({})
    assert str(error.value) == textwrap.dedent("""\
        the runtime flower-simulation needs Flower and Ray
          where: runtime.name
          fix:   pip install "fedfuse[simulation]\"""")


def test_registering_imports_neither_flower_nor_ray() -> None:
    code = "import fedfuse.runtimes, sys; sys.exit(bool({'flwr', 'ray'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


# --- the spool


def side(model: ModelSpec, **more: Any) -> ClientSide:
    generator = torch.Generator().manual_seed(1)
    train = Examples(torch.rand(5, 3, 4, generator=generator).bfloat16(), torch.arange(5))
    empty = Examples(torch.zeros(0, 3, 4, dtype=torch.uint8), torch.zeros(0, dtype=torch.int64))
    return ClientSide("a", ClientData(train, empty, 7, "flip"), model, torch.device("cpu"), 3, **more)


def test_a_side_survives_the_spool(tmp_path: Path) -> None:
    model = ModelSpec({"kind": "none", "sizes": [1, 2]}, 2**62 + 1, (3, 4), 7, {"w": torch.ones(2).half()})
    before = side(model, states=StateStore(tmp_path / "s"), secret=b"\x00\xff", release={"clip_norm": 1.5})
    spool = Spool(tmp_path / "spool")
    spool.write([before])
    after = spool.side("a")
    assert after.data.fingerprint == before.data.fingerprint
    assert after.model.digest == before.model.digest
    assert after.states.folder == tmp_path / "s"
    same = {"id", "device", "num_threads", "secret", "release"}
    assert {name: getattr(after, name) for name in same} == {name: getattr(before, name) for name in same}
    # Whoever gives a client's machine something new must let it travel.
    assert {field.name for field in dataclasses.fields(ClientSide)} == same | {"data", "model", "states"}
    assert {field.name for field in dataclasses.fields(ClientData)} == {"train", "validation", "num_classes", "augment"}
    assert {field.name for field in dataclasses.fields(ModelSpec)} == {
        *("recipe", "seed", "input_shape", "num_classes", "initial", "template")
    }


def test_states_in_memory_become_files(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.write([side(ModelSpec({"kind": "none"}, 0, (3, 4), 7))])
    assert spool.side("a").states.folder == tmp_path / "states"
    assert spool.side("a").release is None


def test_a_model_without_a_recipe_is_refused(tmp_path: Path) -> None:
    model = ModelSpec({"kind": "opaque"}, 0, (3, 4), 7, template=nn.Linear(4, 7))
    with pytest.raises(ConfigError) as error:
        Spool(tmp_path).write([side(model)])
    assert str(error.value) == textwrap.dedent("""\
        the model of a (Linear) cannot be described by a recipe, and its code does not travel to Ray's processes
          where: model
          fix:   use runtime: {name: local}, or write the module so that torch.fx can trace it""")


def test_a_recipe_of_the_running_script_is_refused(tmp_path: Path) -> None:
    def build(recipe: Mapping[str, Any]) -> nn.Module:
        return nn.Identity()

    build.__module__ = "__main__"
    RECIPES.register("own_kind")(build)
    try:
        with pytest.raises(ConfigError, match="is defined in the running script"):
            Spool(tmp_path).write([side(ModelSpec({"kind": "x", "parts": [{"kind": "own_kind"}]}, 0, (3, 4), 7))])
        build.__module__ = "json.tool"
        assert module_of(RECIPES, "own_kind") == "json.tool"
    finally:
        del RECIPES._entries["own_kind"], RECIPES._facts["own_kind"]
    assert module_of(METHODS, "fusefl") == ""


def test_a_spool_that_a_machine_does_not_see(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        Spool(tmp_path / "elsewhere").side("a")
    assert error.value.what == "the clients' files cannot be read: No such file or directory"
    assert error.value.fix == "set runtime.spool to a folder that all machines of the cluster share"


def test_a_module_that_is_not_there() -> None:
    find_method("fusefl", "no_such_module")
    find_method("unheard_of", "")
    with pytest.raises(Exception, match="cannot be imported in Ray"):
        find_method("unheard_of", "no_such_module")
