"""Clients' machines as files, so that processes elsewhere can open them: no data and no code is pickled."""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.client import ClientSide, StateStore
from fedfuse.core.errors import ConfigError, FedfuseError
from fedfuse.core.examples import ClientData, Examples
from fedfuse.core.payload import Payload
from fedfuse.core.registry import METHODS, RECIPES, Registry

_OWN = "fedfuse."


class Spool:
    """A folder that holds every client's data and model specification, and marks of what was tried.

    Args:
        folder: on a cluster, one that all its machines see under the same path.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def stop(self) -> Path:
        """A file that, once it is there, ends all work."""
        return self.folder / "stop"

    def mark(self, answer_key: str) -> Path:
        """The file that is there while a question is being answered, and after the answering process died of it.

        Args:
            answer_key: of the question.
        """
        return self.folder / "tried" / answer_key

    def write(self, sides: Iterable[ClientSide]) -> None:
        """Write down clients' machines, one at a time.

        Args:
            sides: the machines; a state store in memory is replaced by one in the folder.

        Raises:
            ConfigError: a model cannot be described by files.
        """
        # Nothing here outlives the run, so nothing needs to survive a crash.
        for name in ("tried", "clients", "models"):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        for side in sides:
            data, states = side.data, side.states.folder or self.folder / "states"
            payload = Payload(
                {
                    "train/x": data.train.x,
                    "train/y": data.train.y,
                    "validation/x": data.validation.x,
                    "validation/y": data.validation.y,
                    "num_classes": data.num_classes,
                    "augment": data.augment,
                    "model": self._write_model(side),
                    "device": str(side.device),
                    "num_threads": side.num_threads,
                    "states": str(states.resolve()),
                    "secret": side.secret.hex(),
                    "release": json.dumps(None if side.release is None else dict(side.release)),
                }
            )
            self._client(side.id).write_bytes(payload.encode())

    def side(self, client_id: str) -> ClientSide:
        """Open one client's machine.

        Args:
            client_id: whose.

        Raises:
            ConfigError: the folder is not there.
        """
        try:
            facts = Payload.decode(self._client(client_id).read_bytes())
        except OSError as error:
            raise ConfigError(
                f"the clients' files cannot be read: {error.strerror}",
                where=str(self.folder),
                fix="set runtime.spool to a folder that all machines of the cluster share",
            ) from None
        train = Examples(facts.tensor("train/x"), facts.tensor("train/y"))
        validation = Examples(facts.tensor("validation/x"), facts.tensor("validation/y"))
        return ClientSide(
            client_id,
            ClientData(train, validation, int(facts.number("num_classes")), facts.text("augment")),
            _read_model(self._model(facts.text("model"))),
            torch.device(facts.text("device")),
            int(facts.number("num_threads")),
            StateStore(Path(facts.text("states"))),
            bytes.fromhex(facts.text("secret")),
            json.loads(facts.text("release")),
        )

    def _client(self, client_id: str) -> Path:
        return self.folder / "clients" / f"{client_id}.safetensors"

    def _model(self, digest: str) -> Path:
        return self.folder / "models" / f"{digest}.safetensors"

    def _write_model(self, side: ClientSide) -> str:
        spec = side.model
        if spec.template is not None:
            raise ConfigError(
                f"the model of {side.id} ({type(spec.template).__name__}) cannot be described by a recipe, and its "
                "code does not travel to Ray's processes",
                where="model",
                fix="use runtime: {name: local}, or write the module so that torch.fx can trace it",
            )
        path = self._model(spec.digest)
        if not path.exists():
            modules = sorted({module_of(RECIPES, kind) for kind in _kinds(spec.recipe)} - {""})
            facts = Payload(
                {
                    "recipe": json.dumps(spec.recipe),
                    "modules": json.dumps(modules),
                    "seed": spec.seed,
                    "input_shape": json.dumps(list(spec.input_shape)),
                    "num_classes": spec.num_classes,
                }
            )
            path.write_bytes(facts.put_group("initial", spec.initial).encode())
        return spec.digest


# Clients mostly share one model; its weights are not read anew for each of them.
@lru_cache(maxsize=4)
def _read_model(path: Path) -> ModelSpec:
    facts = Payload.decode(path.read_bytes())
    RECIPES.names()
    for name in json.loads(facts.text("modules")):
        importlib.import_module(name)
    return ModelSpec(
        recipe=json.loads(facts.text("recipe")),
        seed=int(facts["seed"]),
        input_shape=tuple(json.loads(facts.text("input_shape"))),
        num_classes=int(facts.number("num_classes")),
        initial=facts.group("initial"),
    )


def _kinds(recipe: Any) -> set[str]:
    """The kinds of a recipe and of those inside it that the registry knows."""
    if isinstance(recipe, Mapping):
        own = {recipe["kind"]} & set(RECIPES.names()) if isinstance(recipe.get("kind"), str) else set()
        return own.union(*(_kinds(value) for value in recipe.values()))
    return set().union(*(_kinds(value) for value in recipe)) if isinstance(recipe, (list, tuple)) else set()


def module_of(registry: Registry[Any], name: str) -> str:
    """The module that another process must import to find an entry by name.

    Args:
        registry: where the entry is.
        name: its name.

    Returns:
        Empty for what fedfuse brings itself.

    Raises:
        ConfigError: it is defined in the running script, which no other process can import.
    """
    module = str(getattr(registry.get(name), "__module__", ""))
    if module == "__main__":
        raise ConfigError(
            f'the {registry.kind} "{name}" is defined in the running script, which Ray\'s processes cannot import',
            where="runtime",
            fix="move it into a module of its own and import it, or use runtime: {name: local}",
        )
    return "" if module.startswith(_OWN) else module


def find_method(name: str, module: str) -> None:
    """Make a method known in this process.

    Args:
        name: of the method.
        module: what :func:`module_of` gave for it.

    Raises:
        FedfuseError: the module cannot be imported here.
    """
    if not module or name in METHODS.names():
        return
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise FedfuseError(
            f'the module "{module}" of the method "{name}" cannot be imported in Ray\'s processes: {error}',
            fix="install it there, or start the run in the folder that holds it",
        ) from None
