"""LoRA files of diffusers pipelines, which have no settings beside them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fedfuse.core.errors import ArtifactError
from fedfuse.core.header import METADATA, read_header
from fedfuse.core.payload import PayloadFile
from fedfuse.fusing.adapter_config import AdapterConfig

FILE = "pytorch_lora_weights.safetensors"
"""What ``save_lora_weights`` of a diffusers pipeline writes, and ``load_lora_weights`` reads."""
ALPHA = ".alpha"
"""What stands behind a module's name in the key of its alpha, in files of older programs."""

_SETTINGS = "lora_adapter_metadata"


def read_config(file: Path, right_tails: Sequence[str]) -> AdapterConfig:
    """What a file says of its own scales, as settings of PEFT.

    Newer files hold the settings of each of the pipeline's networks in their header, older ones an alpha per module, or
    nothing: then alpha is the rank.

    Args:
        file: the file.
        right_tails: what may stand behind a module's name in the key of its A.

    Returns:
        Settings with a pattern for every module that differs.

    Raises:
        ArtifactError: the header's settings are broken, or of a kind that cannot be fused.
    """
    payload = PayloadFile(file)
    parts = _parts(file)
    ranks, alphas = {}, {}
    for key in payload:
        tail = next((tail for tail in right_tails if key.endswith(tail)), None)
        if tail is None:
            continue
        module = key.removesuffix(tail)
        rank = _rank(payload, key)
        ranks[module] = rank
        stated = payload.get(module + ALPHA)
        if isinstance(stated, Tensor):
            alphas[module] = float(stated)
        else:
            network, _, rest = module.partition(".")
            # The scale is what counts, whatever it was made of.
            alphas[module] = parts[network].scale_of(rest) * rank if network in parts else float(rank)
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    table: dict[str, Any] = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(ranks),
        "rank_pattern": {re.escape(module): own for module, own in sorted(ranks.items()) if own != rank},
        "alpha_pattern": {re.escape(module): own for module, own in sorted(alphas.items()) if own != rank},
    }
    config = AdapterConfig(table, str(file))
    config.check()
    return config


def _rank(payload: PayloadFile, key: str) -> int:
    right = payload[key]
    return right.shape[0] if isinstance(right, Tensor) and right.ndim else 1


def _parts(file: Path) -> dict[str, AdapterConfig]:
    """Settings of each network of the pipeline, by its name."""
    text = (read_header(file).get(METADATA) or {}).get(_SETTINGS)
    if text is None:
        return {}
    try:
        table = json.loads(text)
        tables: dict[str, dict[str, Any]] = {}
        for key, value in table.items():
            network, _, setting = key.partition(".")
            tables.setdefault(network, {})[setting] = value
    except (ValueError, AttributeError, RecursionError) as error:
        raise ArtifactError(
            f"the settings in the file's header are broken: {error}", where=str(file), fix="save it again"
        ) from None
    found = {}
    for network, settings in tables.items():
        _refuse_dora(settings, file)
        found[network] = AdapterConfig({"peft_type": "LORA", **settings}, str(file))
        found[network].check()
    return found


def _refuse_dora(settings: Mapping[str, Any], file: Path) -> None:
    if settings.get("use_dora"):
        raise ArtifactError(
            "the file holds DoRA, whose changes have no sum", where=str(file), fix="merge it into its base"
        )
