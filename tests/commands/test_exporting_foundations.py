"""Foundation models as folders of PEFT and transformers, read by processes that know nothing of us."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fedfuse.commands.exporting import export
from fedfuse.core.artifact import Artifact, ModelSpec, detached_state
from fedfuse.core.errors import ArtifactError
from fedfuse.core.payload import Payload
from fedfuse.models import spec

LLAMA = {
    "model_type": "llama",
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "initializer_range": 0.3,
}
BERT = {
    "model_type": "bert",
    "vocab_size": 32,
    "hidden_size": 12,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "initializer_range": 0.3,
}
TOKENS = [[3, 1, 4, 1, 5, 9], [2, 6, 5, 3, 5, 8]]


def made(config: dict[str, Any], task: str, kind: str = "lora", **others: Any) -> ModelSpec:
    facts: dict[str, Any] = {"input_shape": (12,), "num_classes": 3, "seed": 1}
    return spec("transformers", {"config": config, "task": task, "peft": {"kind": kind, "rank": 3}, **others}, **facts)


def trained(model: ModelSpec, folder: Path) -> Path:
    """An artifact whose every trained number differs from the first one."""
    draw = torch.Generator().manual_seed(5)
    state = detached_state(model.build())
    moved = {
        key: tensor + 0.3 * torch.randn(tensor.shape, generator=draw) if tensor.is_floating_point() else tensor
        for key, tensor in state.items()
    }
    return Artifact.of(model, moved).save(folder)


def elsewhere(code: str, *words: str | Path, cwd: Path) -> Any:
    """What a process prints that does not have fedfuse."""
    head = "import json, sys, torch\nsys.modules['fedfuse'] = None\n"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", head + code, *map(str, words)],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={"PATH": "/usr/bin:/bin", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(cwd)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_all_folders_in_a_process_without_fedfuse(tmp_path: Path) -> None:
    lm = trained(made(LLAMA, "causal_lm"), tmp_path / "lm")
    classifier = trained(made(BERT, "sequence_classifier"), tmp_path / "classifier")
    encoder = trained(made(BERT, "encoder"), tmp_path / "encoder")
    for artifact in (lm, classifier, encoder):
        for format_ in ("peft", "transformers"):
            assert export(artifact, format_) == artifact / format_
    export(lm, "peft", tmp_path / "elsewhere")
    code = """
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
tokens = torch.tensor(json.loads(sys.argv[1]))
lm, classifier, encoder = sys.argv[2:]
found = {}
with torch.inference_mode():
    base = AutoModelForCausalLM.from_pretrained(f"{lm}/peft/base")
    found["lm peft"] = PeftModel.from_pretrained(base, f"{lm}/peft").eval()(tokens).logits
    found["lm transformers"] = AutoModelForCausalLM.from_pretrained(f"{lm}/transformers").eval()(tokens).logits
    kind = AutoModelForSequenceClassification
    base = kind.from_pretrained(f"{classifier}/peft/base", num_labels=3)
    found["classifier peft"] = PeftModel.from_pretrained(base, f"{classifier}/peft").eval()(tokens).logits
    found["classifier transformers"] = kind.from_pretrained(f"{classifier}/transformers").eval()(tokens).logits
    base = AutoModel.from_pretrained(f"{encoder}/peft/base")
    for name, net in (
        ("peft", PeftModel.from_pretrained(base, f"{encoder}/peft")),
        ("transformers", AutoModel.from_pretrained(f"{encoder}/transformers")),
    ):
        head = load_file(f"{encoder}/{name}/head.safetensors")
        states = net.eval()(input_ids=tokens).last_hidden_state.mean(1)
        found[f"encoder {name}"] = states @ head["weight"].T + head["bias"]
print(json.dumps({name: logits.tolist() for name, logits in found.items()}))
"""
    found = elsewhere(code, json.dumps(TOKENS), lm, classifier, encoder, cwd=tmp_path)
    x = torch.tensor(TOKENS).float()
    with torch.inference_mode():
        wanted = {
            "lm": Artifact.read(lm).module()(torch.cat([x, torch.zeros_like(x)], 1)),
            "classifier": Artifact.read(classifier).module()(x),
            "encoder": Artifact.read(encoder).module()(x),
        }
    assert len(found) == 6
    for name, logits in found.items():
        torch.testing.assert_close(torch.tensor(logits), wanted[name.partition(" ")[0]], rtol=1e-4, atol=1e-5)


def test_the_adapter_says_what_it_is(tmp_path: Path) -> None:
    artifact = trained(made(LLAMA, "causal_lm"), tmp_path / "lm")
    folder = export(artifact, "peft")
    table = json.loads((folder / "adapter_config.json").read_text())
    assert (table["peft_type"], table["task_type"], table["r"], table["lora_alpha"]) == ("LORA", "CAUSAL_LM", 3, 6)
    assert table["base_model_name_or_path"] == str(folder / "base")
    from fedfuse.fusing.adapter import Adapter

    ours = Adapter(folder)
    state = Artifact.read(artifact).state
    assert len(ours.modules) == 4
    for name in ours.modules:
        key = f"net.base_model.model.{name}.lora"
        product = 2.0 * state[f"{key}_B.default.weight"].double() @ state[f"{key}_A.default.weight"].double()
        torch.testing.assert_close(ours.factors(name).product(), product)


def test_merging_does_not_touch_the_base_that_others_share(tmp_path: Path) -> None:
    model = made(BERT, "encoder")
    artifact = trained(model, tmp_path / "encoder")
    before = {name: p.detach().clone() for name, p in model.build().named_parameters()}
    export(artifact, "transformers")
    for name, p in model.build().named_parameters():
        assert torch.equal(p, before[name])


def test_a_base_from_a_folder_is_named_and_its_tokenizer_comes_along(tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModel

    base = tmp_path / "base-model"
    AutoModel.from_config(AutoConfig.for_model(**BERT)).save_pretrained(base)
    (base / "tokenizer.json").write_text("{}")
    (base / "vocab.txt").write_text("a\nb\n")
    model = spec(
        "transformers",
        {"path": str(base), "peft": {"kind": "lora", "rank": 2}},
        input_shape=(12,),
        num_classes=3,
        seed=1,
    )
    artifact = trained(model, tmp_path / "run")
    folder = export(artifact, "peft")
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base)
    assert not (folder / "base").exists()
    assert sorted(p.name for p in folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "head.safetensors",
        "tokenizer.json",
        "vocab.txt",
    ]
    head = Payload.decode((folder / "head.safetensors").read_bytes())
    assert head["pooling"] == "mean"
    assert torch.equal(head.tensor("weight"), Artifact.read(artifact).state["head.weight"])


@pytest.mark.parametrize("kind", ["ia3", "prompt"])
def test_other_kinds_of_peft(kind: str, tmp_path: Path) -> None:
    artifact = trained(made(LLAMA, "causal_lm", kind), tmp_path / "lm")
    assert export(artifact, "peft").is_dir()


@pytest.mark.parametrize("kind", ["full", "head", "dora", "ia3"])
def test_whole_models_of_every_kind(kind: str, tmp_path: Path) -> None:
    artifact = trained(made(LLAMA, "causal_lm", kind), tmp_path / "lm")
    assert (export(artifact, "transformers") / "model.safetensors").is_file()


# --- what is refused


def refused(path: Path, format_: str, out: Path | None = None) -> str:
    with pytest.raises(ArtifactError) as caught:
        export(path, format_, out)
    return str(caught.value)


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    prompt = trained(made(LLAMA, "causal_lm", "prompt"), tmp_path / "prompt")
    assert refused(prompt, "transformers") == (
        "the virtual tokens of prompt tuning are no weights, so they cannot be merged\n"
        "  where: --format transformers\n  fix:   use --format peft"
    )
    bias = trained(made(BERT, "encoder", "bias"), tmp_path / "bias")
    assert refused(bias, "peft") == (
        "the model has no adapter of PEFT, it was trained by bias\n"
        "  where: --format peft\n  fix:   use --format transformers"
    )
    plain = spec("mlp", {"width": 4, "depth": 1}, input_shape=(3,), num_classes=2, seed=0)
    Artifact.of(plain, detached_state(plain.build())).save(tmp_path / "mlp")
    assert refused(tmp_path / "mlp", "peft") == (
        "the model is none of transformers\n  where: --format\n  fix:   use --format diffusers or safetensors"
    )
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    assert refused(bias, "transformers", tmp_path / "full") == (
        f"there is something already\n  where: {tmp_path / 'full'}\n  fix:   name a new folder with --out"
    )
