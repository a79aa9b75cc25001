"""What an ``adapter_config.json`` of PEFT says."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedfuse.core.errors import ArtifactError
from fedfuse.ops.lora import scaling

FILE = "adapter_config.json"
PREFIX = "base_model.model."
"""What PEFT puts before a module's own name."""

# Kinds of starts that change the base's weights when an adapter is made: the adapter alone is not the change.
_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Kinds of LoRA whose change of a weight is not s B A.
_OTHER_PRODUCTS = (
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "monteclora_config",
    "kasa_config",
    "target_parameters",
)


@dataclass(frozen=True)
class AdapterConfig:
    """An adapter's settings, checked as far as fusing needs them.

    Args:
        table: what the file holds.
        where: the file, for messages.
    """

    table: Mapping[str, Any]
    where: str

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """Read and check the file of a folder.

        Args:
            folder: the adapter's.

        Returns:
            The settings.

        Raises:
            ArtifactError: the file is not there, broken, or of a kind that cannot be fused.
        """
        file = folder / FILE
        try:
            table = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ArtifactError(
                f"there is no {FILE}", where=str(folder), fix="name a folder that save_pretrained of PEFT wrote"
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            raise ArtifactError(f"{FILE} is broken: {error}", where=str(folder), fix="copy the adapter again") from None
        if not isinstance(table, dict):
            raise ArtifactError(f"{FILE} is broken: it is no table", where=str(folder), fix="copy the adapter again")
        config = cls(table, str(file))
        config.check()
        return config

    def check(self) -> None:
        """Refuse settings that cannot be fused.

        Raises:
            ArtifactError: they are broken, or of a kind that cannot be fused.
        """
        kind = self.table.get("peft_type")
        if kind != "LORA":
            raise ArtifactError(
                f"the adapter is of the PEFT kind {kind!r}",
                where=self.where,
                fix="fedfuse fuses LORA; merge others into their base and fuse the checkpoints",
            )
        start = self.table.get("init_lora_weights")
        if isinstance(start, str) and start.lower().startswith(_CHANGING_STARTS):
            raise ArtifactError(
                f'the adapter was started by "{start}", which changes the base model too',
                where=self.where,
                fix="save it as plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
            )
        for name in _OTHER_PRODUCTS:
            if self.table.get(name):
                raise ArtifactError(
                    f'the adapter uses "{name}", with which its change is not B times A',
                    where=self.where,
                    fix="merge it into its base and fuse the checkpoints",
                )
        self._check_number("r", int)
        self._check_number("lora_alpha", (int, float))
        for name, numbers in (("rank_pattern", int), ("alpha_pattern", (int, float))):
            pattern = self.table.get(name) or {}
            if not isinstance(pattern, dict) or not all(_is_positive(value, numbers) for value in pattern.values()):
                raise self._broken(f"{name} is {pattern!r:.80}", "give each pattern a number above 0")
            for key in pattern:
                self._match(key, "")

    def _check_number(self, name: str, kinds: type | tuple[type, ...]) -> None:
        value = self.table.get(name)
        if not _is_positive(value, kinds):
            raise self._broken(f"{name} is {value!r:.80}", "give a number above 0")

    def _broken(self, what: str, fix: str) -> ArtifactError:
        return ArtifactError(f"{FILE} is broken: {what}", where=self.where, fix=fix)

    @property
    def base_model(self) -> str:
        """Name of the base model; empty if the file does not say."""
        return str(self.table.get("base_model_name_or_path") or "")

    @property
    def is_dora(self) -> bool:
        """Whether weights have a trained magnitude."""
        return bool(self.table.get("use_dora"))

    @property
    def is_rank_stabilised(self) -> bool:
        """Whether the scale is alpha / sqrt(r)."""
        return bool(self.table.get("use_rslora"))

    def rank_of(self, module: str) -> int:
        """Rank of a module's adapter.

        Args:
            module: its name in the base model.

        Returns:
            The first pattern's that fits, else ``r``.
        """
        return int(self._by_pattern("rank_pattern", "r", module))

    def alpha_of(self, module: str) -> float:
        """Alpha of a module's adapter.

        Args:
            module: its name in the base model.

        Returns:
            The first pattern's that fits, else ``lora_alpha``.
        """
        return float(self._by_pattern("alpha_pattern", "lora_alpha", module))

    def scale_of(self, module: str) -> float:
        """What a module's B A is multiplied by.

        Args:
            module: its name in the base model.

        Returns:
            The scale.
        """
        return scaling(self.alpha_of(module), self.rank_of(module), is_rank_stabilised=self.is_rank_stabilised)

    def targets(self, module: str) -> bool:
        """Whether the settings say that a module has an adapter.

        Args:
            module: its name in the base model.

        Returns:
            Whether they do; no where they leave it to the model's kind.
        """
        if self._named("exclude_modules", module) or self.saves(module):
            return False
        if not self._named("target_modules", module):
            return False
        layers = self.table.get("layers_to_transform")
        if isinstance(self.table.get("target_modules"), str) or layers in (None, []):
            return True
        patterns = self.table.get("layers_pattern") or []
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = next(filter(None, (self._match(rf"(?:.*?\.)?{p}\.(\d+)\..*", module) for p in patterns)), None)
        if not patterns:
            found = re.fullmatch(r".*?\.[^.]*\.(\d+)\..*", module)
        return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)

    def saves(self, module: str) -> bool:
        """Whether a module is trained and saved whole.

        Args:
            module: its name in the base model, or that of a part of it.

        Returns:
            Whether one of ``modules_to_save`` names it.
        """
        names = self.table.get("modules_to_save") or []
        return any(f".{name}." in f".{module}." for name in names)

    def _named(self, setting: str, module: str) -> bool:
        value = self.table.get(setting) or []
        if isinstance(value, str):
            return value != "all-linear" and self._match(value, module) is not None
        return isinstance(value, list) and is_named(module, value)

    def _by_pattern(self, patterns: str, default: str, module: str) -> Any:
        for pattern, value in (self.table.get(patterns) or {}).items():
            if self._match(rf"(.*\.)?({pattern})", module):
                return value
        return self.table[default]

    def _match(self, pattern: str, module: str) -> re.Match[str] | None:
        try:
            return re.fullmatch(pattern, module)
        except re.error as error:
            raise self._broken(f"{pattern!r:.80} is no pattern: {error}", "write a regular expression") from None


def is_named(module: str, names: Iterable[str]) -> bool:
    """Whether a module is one of some names, or ends in one of them.

    Args:
        module: its name in the base model.
        names: whole names or their last parts.

    Returns:
        Whether it is.

    Example:
        >>> is_named("layers.0.q_proj", ["q_proj"]), is_named("layers.0.q_proj", ["proj"])
        (True, False)
    """
    return any(f".{module}".endswith(f".{name}") for name in names)


def check_same_base(configs: Mapping[str, AdapterConfig]) -> None:
    """Refuse adapters of different base models.

    Args:
        configs: by the adapters' names.

    Raises:
        ArtifactError: two differ.
    """
    items = [(name, config, config.base_model) for name, config in configs.items()]
    named = [(name, config, base) for name, config, base in items if base]
    for name, config, base in named[1:]:
        first, first_config, first_base = named[0]
        mine, its = config.table.get("revision"), first_config.table.get("revision")
        if base != first_base or (mine and its and mine != its):
            shown = [f"{b}@{r}" if r else b for b, r in ((base, mine), (first_base, its))]
            raise ArtifactError(
                f"the adapters have different base models: {name} has {shown[0]}, {first} has {shown[1]}",
                where=config.where,
                fix="fuse adapters of one base model; if both names mean the same one, give it as base_model",
            )


def check_same_settings(configs: Mapping[str, AdapterConfig], names: Iterable[str]) -> None:
    """Refuse adapters that differ in a setting of which there can be one only.

    Args:
        configs: by the adapters' names.
        names: of these settings.

    Raises:
        ArtifactError: two differ.
    """
    (first, config), *others = configs.items()
    for setting in names:
        wanted = config.table.get(setting) or None
        for name, other in others:
            found = other.table.get(setting) or None
            if found != wanted:
                raise ArtifactError(
                    f'the adapters differ in "{setting}": {name} has {found!r:.60}, {first} has {wanted!r:.60}',
                    where=other.where,
                    fix="fuse adapters that agree in it",
                )


def _is_positive(value: Any, kinds: type | tuple[type, ...]) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool) and bool(0 < value < float("inf"))  # type: ignore[operator]
