"""What a fused folder says about itself: ``fusion.json`` for programs and ``README.md`` for people."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from fedfuse.core import VERSION
from fedfuse.fusing.fusion import Fusion
from fedfuse.fusing.measuring import ModuleError, total


def facts_of(
    method: str,
    settings: Mapping[str, Any],
    fusion: Fusion,
    ranks: Mapping[str, int],
    errors: Mapping[str, ModuleError],
    notes: Sequence[str],
    *,
    base_model: str,
) -> dict[str, Any]:
    """Everything that is known about a fusion, as JSON.

    Args:
        method: the rule's name.
        settings: the rule's.
        fusion: what went in.
        ranks: of the result, by module.
        errors: distances from the exact sum, by module.
        notes: what a reader should know.
        base_model: name of the model that the result belongs to.

    Returns:
        The table.
    """
    return {
        "fedfuse": VERSION,
        "method": method,
        "settings": dict(settings),
        "base_model": base_model,
        "library": "diffusers" if fusion.adapters[0].is_pipeline else "peft",
        "adapters": [
            {
                "name": name,
                "weight": weight,
                "digest": adapter.digest if fusion.hashes else "",
                "r": adapter.config.table["r"],
                "lora_alpha": adapter.config.table["lora_alpha"],
                "use_rslora": adapter.config.is_rank_stabilised,
                "num_modules": len(adapter.modules),
            }
            for name, weight, adapter in zip(fusion.names, fusion.weights, fusion.adapters, strict=True)
        ],
        "ranks": dict(ranks),
        "relative_error": total(errors).relative if errors else None,
        "relative_errors": {module: error.relative for module, error in errors.items()},
        "notes": list(notes),
    }


def card(facts: Mapping[str, Any], *, is_adapter: bool) -> str:
    """A model card with what went in.

    Args:
        facts: of :func:`facts_of`.
        is_adapter: whether the folder holds an adapter, and not a whole model.

    Returns:
        Markdown with the front matter that hubs read.
    """
    ranks, error = sorted(set(facts["ranks"].values())), facts["relative_error"]
    front = ["---", *([f"base_model: {json.dumps(facts['base_model'])}"] if facts["base_model"] else [])]
    front += [f"library_name: {facts['library']}" if is_adapter else "library_name: transformers", "tags:", "- fedfuse"]
    front += ["- lora"] if is_adapter else []
    what = "adapter" if is_adapter else "model"
    lines = [*front, "---", "", f"# A fused {what}", ""]
    lines += [f"Made by fedfuse {facts['fedfuse']} from {len(facts['adapters'])} LoRA adapters."]
    lines += ["", f"- rule: `{facts['method']}` {json.dumps(facts['settings']) if facts['settings'] else ''}".rstrip()]
    if ranks:
        lines.append(f"- rank: {ranks[0]}" if len(ranks) == 1 else f"- ranks: {ranks[0]} to {ranks[-1]}")
    if error is not None:
        lines.append(f"- relative distance from the exact weighted sum: {error:.2e}")
    lines += [f"- {note}" for note in facts["notes"]]
    lines += ["", "| adapter | weight | rank | alpha | SHA-256 |", "|---|---:|---:|---:|---|"]
    for adapter in sorted(facts["adapters"], key=lambda a: a["name"]):
        alpha = f"{adapter['lora_alpha']:g}" + (" (rsLoRA)" if adapter["use_rslora"] else "")
        name = str(adapter["name"]).replace("|", "\\|")
        digest = f"`{adapter['digest']}`" if adapter["digest"] else "not computed"
        lines.append(f"| {name} | {adapter['weight']:.4g} | {adapter['r']} | {alpha} | {digest} |")
    return "\n".join(lines) + "\n"
