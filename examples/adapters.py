"""Three LoRA adapters of one small language model, trained on three kinds of sequences, to try fusing with.

The model is a Llama of 0.4 million parameters with random weights, so nothing is downloaded; each adapter learns to
count in steps of its own, for some seconds. Writes ``base`` and the adapters ``a``, ``b`` and ``c``, which differ in
rank, alpha, rsLoRA and target modules, into a folder:

    pip install "fedfuse[hf]"
    python examples/adapters.py adapters
    fedfuse fuse adapters/a adapters/b adapters/c --method flora --out adapters/fused
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")

_WORDS = 64


def sequences(step: int, generator: torch.Generator) -> torch.Tensor:
    """Numbers that go up by a step, modulo the number of words; shape ``(batch, length)``."""
    start = torch.randint(0, _WORDS, (16, 1), generator=generator)
    return (start + step * torch.arange(24)) % _WORDS


def main(folder: Path) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=_WORDS,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    kinds = {
        "a": LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=attention),
        "b": LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, use_rslora=True, target_modules=attention),
        "c": LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"]),
    }
    for step, (name, kind) in enumerate(kinds.items(), start=1):
        torch.manual_seed(1)  # all begin with the same A where they can, as clients of one federation do
        model = get_peft_model(LlamaForCausalLM.from_pretrained(folder / "base"), kind)
        optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=5e-3)
        generator, loss = torch.Generator().manual_seed(step), torch.tensor(0.0)
        for _ in range(30):
            inputs = sequences(step, generator)
            loss = model(input_ids=inputs, labels=inputs).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.save_pretrained(folder / name)
        print(f"wrote {folder / name}: counts by {step}, loss {loss.item():.2f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "adapters"))
