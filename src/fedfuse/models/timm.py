"""Models of timm by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fedfuse.core.errors import ConfigError, ModelError, did_you_mean
from fedfuse.core.registry import register_model
from fedfuse.models.torchvision import built, import_optional


@register_model("timm")
@dataclass(frozen=True, kw_only=True)
class Timm:
    """A model of timm, with fresh weights; the package must be installed by you.

    For pre-trained weights pass the module itself from Python: ``fedfuse.run(model=module, ...)``.

    Args:
        name: as ``timm.list_models()`` gives it, such as ``resnet18``.
        settings: further arguments of the model, such as ``img_size``.
    """

    name: str = "resnet18"
    settings: dict[str, Any] = field(default_factory=dict)

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Build the network.

        Args:
            input_shape: ``(channels, height, width)``.
            num_classes: number of outputs.

        Raises:
            ConfigError: there is no model of that name, or it has no such setting.
            ModelError: timm cannot be imported, or the inputs are no images.
        """
        if len(input_shape) != 3:
            raise ModelError(
                f"models of timm take images, not inputs of shape {input_shape}",
                where="model.family",
                fix="use family: mlp",
            )
        timm = import_optional("timm")
        if not timm.is_model(self.name):
            known = timm.list_models()
            raise ConfigError(
                f'timm has no model "{self.name}"',
                where="model.name",
                fix=did_you_mean(self.name, known).split("known:")[0] + "timm.list_models() lists them",
            )
        return built(
            timm.create_model,
            self.name,
            pretrained=False,
            num_classes=num_classes,
            in_chans=input_shape[0],
            **self.settings,
        )
