"""A model of one's own, from a Python file."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.errors import ConfigError, did_you_mean
from fedfuse.core.registry import register_model
from fedfuse.models.graph import user_spec


@register_model("python")
@dataclass(frozen=True, kw_only=True)
class PythonFile:
    """A model of your own: a class or function without arguments in a Python file, which is run.

    The module is described by its operations, so neither clients nor whoever loads the result need the file.

    Args:
        path: the file.
        function: name of the class or function; its weights are drawn from the run's seed unless it sets them itself.
    """

    path: str
    function: str = "build"

    def spec(self, input_shape: tuple[int, ...], num_classes: int, seed: int) -> ModelSpec:
        """The specification of the module.

        Args:
            input_shape: shape of one input.
            num_classes: number of outputs.
            seed: first weights are drawn from it.

        Raises:
            ConfigError: the file or the function cannot be used.
            ModelError: it does not map such inputs to that many outputs.
        """
        return user_spec(self._function(), input_shape=input_shape, num_classes=num_classes, seed=seed)

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Build the module.

        Args:
            input_shape: shape of one input.
            num_classes: number of outputs.

        Raises:
            ConfigError: the file or the function cannot be used.
        """
        return self.spec(input_shape, num_classes, 0).build()

    def _function(self) -> Callable[[], nn.Module]:
        path = Path(self.path).expanduser()
        if not path.is_file():
            raise ConfigError("there is no such file", where=f"model.path: {path}", fix="name a Python file")
        spec = importlib.util.spec_from_file_location(f"fedfuse_model_{path.stem}", path)
        if spec is None or spec.loader is None:
            raise ConfigError("the file is no Python file", where=f"model.path: {path}", fix="end its name in .py")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except Exception as error:  # whatever a user's file does
            raise ConfigError(
                f"the file cannot be run: {type(error).__name__}: {error}",
                where=f"model.path: {path}",
                fix="try it by itself: python " + str(path),
            ) from error
        function = getattr(module, self.function, None)
        if not callable(function):
            names = [name for name, value in vars(module).items() if callable(value) and not name.startswith("_")]
            raise ConfigError(
                f'the file has no class or function "{self.function}"',
                where="model.function",
                fix=did_you_mean(self.function, names),
            )
        found: Callable[[], nn.Module] = function
        return found
