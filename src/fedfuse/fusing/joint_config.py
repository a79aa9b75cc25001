"""The ``adapter_config.json`` of a fused adapter."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from fedfuse.core.errors import ArtifactError
from fedfuse.fusing.adapter import Adapter
from fedfuse.fusing.adapter_config import AdapterConfig, check_same_base, check_same_settings

# There can be one only, because it says how the model computes.
_ONE_ONLY = (
    "fan_in_fan_out",
    "layer_replication",
    "alora_invocation_tokens",
    "trainable_token_indices",
    "megatron_config",
    "ensure_weight_tying",
    "use_dora",
)
# They say how an adapter starts, which is over.
_OF_STARTS = ("eva_config", "corda_config", "loftq_config", "lora_ga_config", "qalora_group_size")
_LIMITS = ("exclude_modules", "layers_to_transform", "layers_pattern")


def check_alike(names: Sequence[str], adapters: Sequence[Adapter], *, base_model: str = "") -> None:
    """Refuse adapters that do not belong to one model.

    Args:
        names: of the adapters, for messages.
        adapters: in the same order.
        base_model: its name, where the adapters may call it by different ones.

    Raises:
        ArtifactError: base models, settings, shapes or modules do not agree.
    """
    configs = {name: adapter.config for name, adapter in zip(names, adapters, strict=True)}
    if not base_model:
        check_same_base(configs)
    check_same_settings(configs, _ONE_ONLY)
    tasks = {name: str(config.table["task_type"]) for name, config in configs.items() if config.table.get("task_type")}
    if len(set(tasks.values())) > 1:
        raise ArtifactError(
            "the adapters are for different tasks: " + ", ".join(f"{name}: {task}" for name, task in tasks.items()),
            where="task_type",
            fix="fuse adapters of one task",
        )
    for name, adapter in zip(names, adapters, strict=True):
        for other_name, other in zip(names, adapters, strict=True):
            both = next((module for module in adapter.modules if other.config.saves(module)), None)
            if both is not None:
                raise ArtifactError(
                    f'"{both}" has an adapter in {name} and is saved whole in {other_name}',
                    where=str(adapter.folder),
                    fix="fuse adapters that treat it alike",
                )
    first_with: dict[str, tuple[str, tuple[Any, ...]]] = {}
    for name, adapter in zip(names, adapters, strict=True):
        looks: dict[str, tuple[Any, ...]] = {
            module: (*place.shape, place.left, place.right_shape[1:]) for module, place in adapter.modules.items()
        }
        looks |= {key: adapter.looks(key)[0] for key in adapter.wholes}
        for part, found in looks.items():
            first, wanted = first_with.setdefault(part, (name, found))
            if found != wanted:
                shown = ["x".join(map(str, [n for n in look if isinstance(n, int)])) for look in (found, wanted)]
                raise ArtifactError(
                    f'"{part}" is {shown[0]} in {name} and {shown[1]} in {first}',
                    where=str(adapter.folder),
                    fix="fuse adapters of one base model and one set of classes",
                )
    for name, adapter in zip(names, adapters, strict=True):
        modules = {module: adapter.config.targets(module) for module in first_with if module not in adapter.modules}
        saved = {
            key: key not in adapter.wholes and adapter.config.saves(key.removeprefix("base_model.model."))
            for other in adapters
            for key in other.wholes
        }
        missing = next((part for part, is_missing in {**modules, **saved}.items() if is_missing), None)
        if missing is not None:
            raise ArtifactError(
                f'{name} has no tensors of "{missing}", which its settings name and {first_with[missing][0]} has',
                where=str(adapter.folder),
                fix="the file is not whole: copy it again, or save it again by PEFT",
            )


def joint_config(
    adapters: Sequence[Adapter], ranks: Mapping[str, int], *, base_model: str, has_wholes: bool = True
) -> dict[str, Any]:
    """Settings with which PEFT loads the fused adapter.

    What all adapters agree in stays. The scale is 1 everywhere: alpha is the rank.

    Args:
        adapters: what was fused.
        ranks: of the fused adapter, by module.
        base_model: name of the base model.
        has_wholes: whether the fused adapter holds modules that were saved whole.

    Returns:
        The table.
    """
    tables = [adapter.config.table for adapter in adapters]
    common = {key: value for key, value in tables[0].items() if all(t.get(key) == value for t in tables)}
    saved = sorted({str(name) for table in tables for name in table.get("modules_to_save") or []})
    biases = [str(table.get("bias") or "none") for table in tables]
    table: dict[str, Any] = {
        **{key: value for key, value in common.items() if key not in _OF_STARTS},
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        # Some tasks make PEFT ask for a head.
        "task_type": next((t["task_type"] for t in tables if has_wholes and t.get("task_type")), None),
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "lora_bias": any(table.get("lora_bias") for table in tables),
        "lora_dropout": common.get("lora_dropout", 0.0),
        "bias": max(biases, key=("none", "lora_only", "all").index) if has_wholes else "none",
        "modules_to_save": (saved or None) if has_wholes else None,
        **_targets(adapters, list(ranks)),
    }
    rank = Counter(ranks.values()).most_common(1)[0][0]
    for named in (_short_names, _full_names, _escaped_names):
        pattern = named(ranks, rank)
        table |= {"r": rank, "lora_alpha": rank, "rank_pattern": pattern, "alpha_pattern": dict(pattern)}
        config = AdapterConfig(table, "")
        if all(config.rank_of(module) == own for module, own in ranks.items()):
            break
    return dict(sorted(table.items()))


def _targets(adapters: Sequence[Adapter], modules: Sequence[str]) -> dict[str, Any]:
    """Settings that target these modules and no others, as short as can be."""
    tables = [adapter.config.table for adapter in adapters]
    kept = {key: tables[0].get(key) for key in ("target_modules", *_LIMITS)}
    targets = [table.get("target_modules") for table in tables]
    if all(isinstance(target, list) for target in targets) and not any(t.get(key) for t in tables for key in _LIMITS):
        found: dict[str, Any] = {"target_modules": sorted({name for target in targets for name in target or []})}
    elif all({key: table.get(key) for key in kept} == kept for table in tables):
        found = {key: value for key, value in kept.items() if key in tables[0]}
    else:
        found = {"target_modules": []}
    if all(AdapterConfig({**found, "modules_to_save": None}, "").targets(module) for module in modules):
        # A module that an adapter could have had but that none has must not come back.
        had = {module for adapter in adapters for module in adapter.modules}
        if had == set(modules):
            return found
    return {"target_modules": sorted(modules), **{key: None for key in _LIMITS if key in kept}}


def _short_names(ranks: Mapping[str, int], rank: int) -> dict[str, int]:
    """Last parts of names, where all modules of one last part have one rank."""
    by_last: dict[str, set[int]] = {}
    for module, own in ranks.items():
        by_last.setdefault(module.rpartition(".")[2], set()).add(own)
    return {last: min(found) for last, found in sorted(by_last.items()) if found != {rank}}


def _full_names(ranks: Mapping[str, int], rank: int) -> dict[str, int]:
    """Whole names, longest first: the first pattern that a name ends in decides."""
    return {m: ranks[m] for m in sorted(ranks, key=lambda m: (-len(m), m)) if ranks[m] != rank}


def _escaped_names(ranks: Mapping[str, int], rank: int) -> dict[str, int]:
    """Whole names that fit nothing else, for models with names that are the ends of others."""
    return {f"^{re.escape(m)}": own for m, own in sorted(ranks.items()) if own != rank}
