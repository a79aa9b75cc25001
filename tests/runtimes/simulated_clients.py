"""A federation on Flower's simulation engine for tests: its configuration, its clients, and a method of one's own."""

from __future__ import annotations

import importlib
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fedfuse.core.client import ClientSide, StateStore
from fedfuse.core.cohort import Cohort
from fedfuse.core.payload import Payload
from fedfuse.core.registry import METHODS
from fedfuse.experiment.configuration import read_config
from fedfuse.experiment.setting import Loader, Setting
from fedfuse.runtimes.flower.leftovers import processes_of

CONFIG: dict[str, Any] = {
    "seed": 3,
    "data": {
        "source": "digits",
        "limit": 300,
        "test_limit": 100,
        "partition": {"scheme": "dirichlet", "num_clients": 5, "dirichlet_alpha": 0.5},
    },
    "model": {"family": "cnn", "width": 4, "depth": 4, "norm": "batch"},
    "server": {"threads": 1},
}

TOY = '''
"""A method outside of fedfuse, in a module that Ray's processes have to find."""

import os
import time
from dataclasses import dataclass

import torch

from fedfuse.core.method import Method, client_task, register_method
from fedfuse.core.payload import Payload


@register_method("simulated_toy")
@dataclass(frozen=True, kw_only=True)
class Toy(Method):
    mode: str = ""

    @client_task(uploads=("n", "w/*", "threads"), state=True)
    def work(self, client, msg):
        if client.id == "client_1":
            if self.mode == "fails":
                raise ZeroDivisionError("no luck")
            if self.mode == "breaks":
                return Payload({"secret": 1})
            if self.mode in ("dies", "both"):
                os._exit(7)
        if client.id == "client_3" and self.mode in ("hangs", "both"):
            time.sleep(60)
        if self.mode == "forever":
            time.sleep(600)
        client.state["count"] = int(client.state.get("count", 0)) + 1
        product = torch.rand(64, 64, generator=client.rng.torch("m")) @ torch.rand(64, 64) + msg.tensor("w/x")
        return Payload({"n": client.state["count"], "w/x": product.bfloat16(), "threads": torch.get_num_threads()})
'''


@contextmanager
def own_method(folder: Path) -> Iterator[Any]:
    """The class of a method in a module of the user's own."""
    (folder / "simulated_toy.py").write_text(TOY)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("simulated_toy").Toy
    sys.path.remove(str(folder))
    del sys.modules["simulated_toy"], METHODS._entries["simulated_toy"], METHODS._facts["simulated_toy"]


@contextmanager
def nothing_is_left() -> Iterator[None]:
    """No process, no thread that keeps the program, no change of the environment."""
    names = {thread.name for thread in threading.enumerate() if not thread.daemon}
    path = os.environ.get("PYTHONPATH")
    yield
    assert ray_processes() == []
    assert {thread.name for thread in threading.enumerate() if not thread.daemon} == names
    assert os.environ.get("PYTHONPATH") == path


def digits_setting() -> Setting:
    return Loader(read_config(CONFIG)).setting(CONFIG["seed"])


def ray_processes() -> list[str]:
    """Names of Ray's processes that this program has started."""
    return [Path("/proc", str(each), "comm").read_text().strip() for each in processes_of(os.getpid())]


def sides_of(setting: Setting, folder: Path) -> dict[str, ClientSide]:
    states = StateStore(folder)
    return {name: ClientSide(name, data, setting.model, states=states) for name, data in setting.data.clients.items()}


def ask(runtime: Any, setting: Setting, method: Any, key: str, **more: Any) -> Any:
    cohort = Cohort(runtime=runtime, method=method, model_of=lambda _: setting.model, seed=1, **more)
    return cohort.ask(type(method).work, Payload({"w/x": torch.ones(64, 64)}), key=key)
