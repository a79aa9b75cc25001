"""Fused folders in PEFT itself: a process that has never heard of fedfuse computes what the exact sum computes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fedfuse.fusing import add_adapter, fuse_adapters

pytest.importorskip("transformers")
pytest.importorskip("peft")

_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}

_COMMON = """
import json, sys, torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM
from peft import LoraConfig, PeftModel, get_peft_model
folder, kind = sys.argv[1], sys.argv[2]
KIND = {"llama": LlamaForCausalLM, "bert": BertForSequenceClassification}[kind]
def logits(model):
    inputs = torch.randint(0, 60, (3, 7), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return model.double().eval()(input_ids=inputs).logits
"""

# Adapters of several kinds, and the logits of the exact sum: each is merged by PEFT, and the differences are summed.
_MAKE = (
    _COMMON
    + """
torch.manual_seed(0)
sizes = dict(vocab_size=60, hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4)
if kind == "llama":
    model = KIND(LlamaConfig(num_key_value_heads=2, **sizes))
    specs = {
        "a": dict(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"]),
        "b": dict(r=3, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "k_proj", "down_proj"],
                  rank_pattern={"layers.0.self_attn.q_proj": 2}, alpha_pattern={"k_proj": 5}),
        "c": dict(r=2, lora_alpha=3, target_modules=["embed_tokens", "o_proj"], modules_to_save=["lm_head"]),
        "d": dict(r=2, lora_alpha=3, target_modules=r".*layers\\.1\\..*(gate_proj|up_proj)"),
    }
    task = "CAUSAL_LM"
else:
    model = KIND(BertConfig(num_labels=3, **sizes))
    specs = {
        "a": dict(r=2, lora_alpha=4, target_modules=["query", "value"]),
        "b": dict(r=5, lora_alpha=5, use_rslora=True, target_modules=["query", "key", "value"],
                  layers_to_transform=[1]),
        "c": dict(r=3, lora_alpha=9, target_modules=["dense"], exclude_modules=["pooler.dense"]),
    }
    task = "SEQ_CLS"
model.save_pretrained(folder + "/base")
weights = json.loads(sys.argv[3])
start = {key: value.double() for key, value in KIND.from_pretrained(folder + "/base").state_dict().items()}
total = {key: value.clone() for key, value in start.items()}
heads = {}
for name, spec in specs.items():
    tuned = get_peft_model(KIND.from_pretrained(folder + "/base"), LoraConfig(task_type=task, **spec))
    for key, value in tuned.named_parameters():
        if "lora_" in key or "modules_to_save" in key:
            torch.nn.init.normal_(value, std=0.2)
    tuned.save_pretrained(folder + "/" + name)
    again = PeftModel.from_pretrained(KIND.from_pretrained(folder + "/base").double(), folder + "/" + name)
    for key, value in again.double().merge_and_unload().state_dict().items():
        if key.startswith(("lm_head", "classifier")):
            if not value.equal(start[key]):
                heads.setdefault(key, []).append((weights[name], value))
        else:
            total[key] += weights[name] * (value - start[key])
for key, found in heads.items():
    total[key] = sum(weight * value for weight, value in found) / sum(weight for weight, _ in found)
exact = KIND.from_pretrained(folder + "/base").double()
exact.load_state_dict(total)
print(json.dumps(logits(exact).tolist()))
"""
)

_LOAD = (
    _COMMON
    + """
found = []
for base, adapters in json.loads(sys.argv[3]):
    model = KIND.from_pretrained(base).double()
    for number, adapter in enumerate(adapters):
        model = PeftModel.from_pretrained(model, adapter)
        if number < len(adapters) - 1:
            model = model.merge_and_unload()
    found.append(logits(model).tolist())
assert not any(name.partition(".")[0] == "fedfuse" for name in sys.modules)
print(json.dumps(found))
"""
)


def in_a_fresh_process(script: str, *words: str) -> Any:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script, *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **_OFFLINE},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def distance(one: Any, two: Any) -> float:
    if isinstance(one, list):
        return max(distance(a, b) for a, b in zip(one, two, strict=True))
    return abs(float(one) - float(two))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "weights"),
    [("llama", {"a": 0.4, "b": 0.3, "c": 0.2, "d": 0.1}), ("bert", {"a": 0.5, "b": 0.3, "c": 0.2})],
)
def test_a_fused_folder_gives_the_logits_of_the_exact_sum(kind: str, weights: dict[str, float], tmp_path: Path) -> None:
    wanted = in_a_fresh_process(_MAKE, str(tmp_path), kind, json.dumps(weights))
    base, folders = str(tmp_path / "base"), [tmp_path / name for name in weights]
    shares = list(weights.values())
    cases: list[tuple[str, dict[str, Any]]] = [
        ("flora", {}),
        ("fedex", {"residual": "apart"}),
        ("merge", {"base": base}),
        ("average", {}),
    ]
    errors, loads = {}, []
    for method, settings in cases:
        out = tmp_path / method
        errors[method] = fuse_adapters(folders, method=method, weights=shares, out=out, **settings).error.relative
        adapters = {"fedex": [str(out / "residual"), str(out)], "merge": []}.get(method, [str(out)])
        loads.append((str(out) if method == "merge" else base, adapters))
    # A folder that grew, the other way round.
    for path, share in zip(folders[::-1], shares[::-1], strict=True):
        add_adapter(tmp_path / "growing", path, weight=share)
    loads.append((base, [str(tmp_path / "growing")]))
    logits = in_a_fresh_process(_LOAD, str(tmp_path), kind, json.dumps(loads))
    methods = [*(method for method, _ in cases), "growing"]
    found = {method: distance(own, wanted) for method, own in zip(methods, logits, strict=True)}
    inexact = found.pop("average"), errors.pop("average")
    # Adapters and models are saved in single precision.
    assert max(found.values()) < 5e-6, found
    assert max(errors.values()) < 1e-6, errors
    # So that what is compared depends on the adapters.
    assert min(inexact) > 1e-3
