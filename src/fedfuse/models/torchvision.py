"""Models of torchvision by name."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from torch import nn

from fedfuse.core.errors import ConfigError, ModelError, did_you_mean
from fedfuse.core.registry import register_model


@register_model("torchvision")
@dataclass(frozen=True, kw_only=True)
class TorchVision:
    """A classification model of torchvision, with fresh weights; the package must be installed by you.

    For pre-trained weights pass the module itself from Python: ``fedfuse.run(model=module, ...)``.

    Args:
        name: as ``torchvision.models.list_models()`` gives it, such as ``resnet18``.
        settings: further arguments of the model.
    """

    name: str = "resnet18"
    settings: dict[str, Any] = field(default_factory=dict)

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Build the network.

        Args:
            input_shape: ``(3, height, width)``.
            num_classes: number of outputs.

        Raises:
            ConfigError: there is no model of that name, or it has no such setting.
            ModelError: torchvision cannot be imported, or the inputs are no colour images.
        """
        if len(input_shape) != 3 or input_shape[0] != 3:
            raise ModelError(
                f"models of torchvision take colour images, not inputs of shape {input_shape}",
                where="model.family",
                fix="use family: timm, which takes any number of channels, or resnet",
            )
        models = import_optional("torchvision.models")
        known = models.list_models(module=models)
        if self.name not in known:
            raise ConfigError(
                f'torchvision has no model "{self.name}"', where="model.name", fix=did_you_mean(self.name, known)
            )
        return built(models.get_model, self.name, weights=None, num_classes=num_classes, **self.settings)


def import_optional(name: str) -> ModuleType:
    """Import a package that users bring themselves.

    Args:
        name: the module, such as ``torchvision.models``.

    Returns:
        The module.

    Raises:
        ModelError: it is not installed, or does not fit the installed torch.
    """
    package = name.split(".", 1)[0]
    try:
        return importlib.import_module(name)
    except ImportError:
        problem, fix = "is not installed", f"pip install {package}, in the build that fits your torch"
    # A torchvision of another build than torch fails while it registers its operators.
    except (RuntimeError, AttributeError, OSError) as error:
        problem = f"cannot be imported: {(str(error).splitlines() or [''])[0]}"
        fix = "install torch and torchvision of the same build (both for the CPU, or both for the same CUDA)"
    raise ModelError(f"{package} {problem}", where="model.family", fix=fix)


def built(make: Any, name: str, **settings: Any) -> nn.Module:
    """Call another package's function that makes a model.

    Args:
        make: the function.
        name: of the model.
        settings: further arguments.

    Returns:
        The model.

    Raises:
        ConfigError: the function does not take these settings.
    """
    try:
        module: nn.Module = make(name, **settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f'the model "{name}" cannot be built: {error}',
            where="model.settings",
            fix="give settings that the model takes",
        ) from None
    return module
