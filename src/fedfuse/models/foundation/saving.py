"""Foundation models as folders that PEFT, transformers and diffusers load without anything of ours."""

from __future__ import annotations

import copy
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fedfuse.core.errors import ArtifactError, ConfigError
from fedfuse.core.files import write_atomically
from fedfuse.core.payload import Payload
from fedfuse.models.foundation.base import base_folder, library, quiet
from fedfuse.models.foundation.foundation import Foundation
from fedfuse.models.foundation.pipeline import save_pipeline
from fedfuse.models.foundation.text_to_image import TextToImage
from fedfuse.models.foundation.transformers import AUTO_CLASSES, load_net

HEAD = "head.safetensors"
"""The file with a head that neither PEFT nor transformers knows of: ``weight`` and ``bias`` on the pooled states."""
PIPELINE_FILE = "pytorch_lora_weights.safetensors"
"""The file with the adapter of a text-to-image model."""
BASE = "base"
"""Folder of the base model, where it was drawn from a configuration and is nowhere else."""

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt", "*.model")
_UNMERGEABLE = ("prompt", "prefix")
_NUM_TOKENS = 7


def save_adapter(module: nn.Module, folder: Path) -> None:
    """Write what PEFT put into a model as a folder that ``PeftModel.from_pretrained`` loads.

    Beside it come the tokenizer, where one is known, the head of a pooled encoder, and the base where it was drawn
    from a configuration. Of a text-to-image model it is the file that ``load_lora_weights`` of a pipeline reads.

    Args:
        module: of the family ``transformers`` or ``diffusers``.
        folder: made if it is not there.

    Raises:
        ArtifactError: the model is of another family, or has nothing of PEFT in it, or is not read back the same.
    """
    if isinstance(module, TextToImage):
        _save_lora_weights(module, folder)
        return
    own = _checked(module)
    peft = library("peft")
    if not isinstance(own.net, peft.PeftModel):
        raise ArtifactError(
            f"the model has no adapter of PEFT, it was trained by {own.recipe['peft']['kind']}",
            where="--format peft",
            fix="use --format transformers",
        )
    net: Any = own.net
    folder.mkdir(parents=True, exist_ok=True)
    base = own.recipe["base"]
    name = base.get("path", str(folder / BASE))
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        if "path" not in base:
            load_net(own.recipe).save_pretrained(folder / BASE)
        net.peft_config["default"].base_model_name_or_path = name
        # What PEFT finds on a hub about the base must not decide what is written.
        net.save_pretrained(folder, save_embedding_layers=False)
        _save_own_head(own, folder)
        _save_beside(own, folder)
        again = peft.PeftModel.from_pretrained(load_net(own.recipe), folder)
    _check(again, net, own, folder)


def save_whole(module: nn.Module, folder: Path) -> None:
    """Write a model with its adapter merged into it, as a folder that transformers loads.

    Args:
        module: of the family ``transformers``.
        folder: made if it is not there.

    Raises:
        ArtifactError: the model is none of transformers, or cannot be merged, or is not read back the same.
    """
    own = _checked(module)
    kind = own.recipe["peft"]["kind"]
    if kind in _UNMERGEABLE:
        raise ArtifactError(
            f"the virtual tokens of {kind} tuning are no weights, so they cannot be merged",
            where="--format transformers",
            fix="use --format peft",
        )
    tokens = _tokens(own)
    wanted = _outputs(own.net, tokens)
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        net: Any = own.net
        if hasattr(net, "merge_and_unload"):
            # The weights are shared with other copies of the base: merge into new ones.
            net = net.merge_and_unload(safe_merge=True)
        net.config.use_cache = True
        folder.mkdir(parents=True, exist_ok=True)
        net.save_pretrained(folder)
        _save_beside(own, folder)
        again = getattr(library("transformers"), AUTO_CLASSES[own.recipe["task"]]).from_pretrained(
            folder, local_files_only=True, dtype=torch.float32
        )
    _compare(_outputs(again, tokens), wanted, folder)


def save_pictures(module: nn.Module, folder: Path) -> None:
    """Write a text-to-image model with its adapter merged into it, as a pipeline that diffusers loads.

    Args:
        module: of the family ``diffusers``.
        folder: made if it is not there.

    Raises:
        ArtifactError: the model is of another family.
    """
    if not isinstance(module, TextToImage):
        raise ArtifactError("the model is none of diffusers", where="--format", fix="use --format safetensors")
    save_pipeline(module.pipeline(), folder)


def _save_lora_weights(module: TextToImage, folder: Path) -> None:
    kind = module.recipe["peft"]["kind"]
    if kind not in ("lora", "rslora"):
        raise ArtifactError(
            f"a LoRA file of diffusers holds LoRA, and the model was trained by {kind}",
            where="--format peft",
            fix="use --format diffusers",
        )
    net: Any = copy.deepcopy(module.net)
    denoiser = type(net.get_base_model())
    if not hasattr(denoiser, "load_lora_adapter"):
        raise ArtifactError(
            f"diffusers loads no LoRA file into a {denoiser.__name__}",
            where="--format peft",
            fix="use --format diffusers, which writes the whole pipeline",
        )
    whole = module.pipeline()
    state = {}
    for name, part in net.get_base_model().named_modules():
        if "default" in getattr(part, "lora_A", ()):
            left, right = part.lora_B["default"].weight, part.lora_A["default"].weight
            # A file without settings says by its form that every scale is 1.
            state[f"{whole.kind}.{name}.lora_B.weight"] = (part.scaling["default"] * left).detach().contiguous()
            state[f"{whole.kind}.{name}.lora_A.weight"] = right.detach().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / PIPELINE_FILE
    save_file(state, file, metadata={"format": "pt"})
    with warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        plain = net.unload()
        plain.load_lora_adapter(load_file(file), prefix=whole.kind)
        plain.fuse_lora()
        plain.unload_lora()
    wanted = whole.denoiser.state_dict()
    for name, tensor in plain.state_dict().items():
        _compare(tensor, wanted[name], file)


def _checked(module: nn.Module) -> Foundation:
    if not isinstance(module, Foundation) or module.recipe.get("kind") != "transformers":
        raise ArtifactError(
            "the model is none of transformers", where="--format", fix="use --format diffusers or safetensors"
        )
    return module.eval()


def _save_own_head(module: Foundation, folder: Path) -> None:
    """Add the trained head of a sequence classifier, which stands in the network itself, to an adapter's folder."""
    file = folder / "adapter_config.json"
    table = json.loads(file.read_text(encoding="utf-8"))
    if module.recipe["task"] != "sequence_classifier" or "modules_to_save" not in table:
        return
    inner = module.net.get_base_model()
    name = next(name for name, part in inner.named_modules() if part is module.classifier)
    # PEFT takes these for the head of a classifier, with all that is in them.
    name = next((part for part in name.split(".") if part in ("classifier", "score")), name)
    state = {f"base_model.model.{name}.{key}": t for key, t in inner.get_submodule(name).state_dict().items()}
    weights = folder / "adapter_model.safetensors"
    save_file({**load_file(weights), **state}, weights, metadata={"format": "pt"})
    table |= {"modules_to_save": [name], "task_type": "SEQ_CLS"}
    write_atomically(file, json.dumps(table, indent=2, sort_keys=True).encode())


def _save_beside(module: Foundation, folder: Path) -> None:
    head = getattr(module, "head", None)
    if isinstance(head, nn.Linear):
        state = {"weight": head.weight, "bias": head.bias}
        write_atomically(folder / HEAD, Payload({**state, "pooling": str(module.recipe["pooling"])}).encode())
    try:
        source = base_folder(module.recipe["tokenizer"])
    except ConfigError:
        return
    for pattern in _TOKENIZER_FILES:
        for file in sorted(source.glob(pattern)):
            shutil.copyfile(file, folder / file.name)


def _check(found: Any, wanted: Any, module: Foundation, folder: Path) -> None:
    tokens = _tokens(module)
    _compare(_outputs(found, tokens), _outputs(wanted, tokens), folder)


def _compare(found: Tensor, wanted: Tensor, folder: Path) -> None:
    if not torch.allclose(found, wanted, rtol=1e-3, atol=1e-5):
        worst = (found - wanted).abs().max().item()
        raise ArtifactError(
            f"the exported model differs by {worst:.2g}", where=str(folder), fix="use --format safetensors"
        )


def _tokens(module: Foundation) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    vocabulary: int = module.vocabulary  # type: ignore[assignment]
    return torch.randint(0, vocabulary, (2, _NUM_TOKENS), generator=draw)


def _outputs(net: Any, tokens: Tensor) -> Tensor:
    with torch.inference_mode():
        found = net.eval()(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    output = found.last_hidden_state if getattr(found, "logits", None) is None else found.logits
    assert isinstance(output, Tensor)
    return output.clone()
