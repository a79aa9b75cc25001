"""Small causal language models to start from, and the data to fine-tune them on.

The training rows of `instruct` are halved, task by task. One half becomes plain text: a byte-pair tokenizer is made of
it, and models of three sizes are pre-trained on it, each saved after an eighth of its steps (`short`) and at the end
(`long`). The other half, of the tasks with short texts, is written as the clients' data; no model saw any of it.
What was begun is continued by the same command.

    python papers/oneshot_fft/pretrain.py [--data ../shared/data/instruct] [--sizes small,large] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute
import pyarrow.parquet
import torch
from torch import Tensor

from fedfuse.core.files import write_atomically
from fedfuse.core.payload import Payload
from fedfuse.core.seeding import Rng

SIZES = {
    "small": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
    "medium": {"hidden_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4},
    "large": {"hidden_size": 192, "num_hidden_layers": 4, "num_attention_heads": 6},
    # For a GPU: an hour of one, with --epochs 10 and a larger corpus of plain text beside it.
    "xlarge": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12},
}
TASKS = (
    "app_reviews",
    "common_gen",
    "commonsense_qa",
    "gigaword",
    "glue_qqp",
    "rotten_tomatoes",
    "social_i_qa",
    "wiki_qa",
)
DEGREES = {"short": 8, "long": 1}
VOCABULARY, BLOCK, BATCH, WARMUP = 2048, 96, 16, 50
SAVED_EVERY = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/instruct"))
    parser.add_argument("--out", type=Path, default=Path("runs/oneshot_fft"))
    parser.add_argument("--sizes", default="small,medium,large")
    parser.add_argument("--epochs", type=float, default=2.0, help="passes over the plain text")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    corpus = halve(arguments.data, arguments.out / "instruct")
    tokenizer = make_tokenizer(corpus)
    blocks = pack(tokenizer, corpus)
    print(f"{len(corpus)} texts, {blocks.numel()} tokens")
    for size in arguments.sizes.split(","):
        pretrain(size, blocks, tokenizer, arguments)


def halve(source: Path, target: Path) -> list[str]:
    """Write one half of the training rows and the test rows for the clients; return the other half as plain text."""
    corpus: list[str] = []
    for part in ("train", "test"):
        files = sorted(source.glob(f"{part}-*.parquet"))
        table = pyarrow.parquet.read_table(files)
        if part == "train":
            order = Rng(0).numpy("halves").permutation(table.num_rows)
            halves: dict[str, list[int]] = {}
            for row in order.tolist():
                halves.setdefault(table["task"][row].as_py(), []).append(row)
            taken = sorted(row for rows in halves.values() for row in rows[: len(rows) // 2])
            prompts, completions = (table[name].to_pylist() for name in ("prompt", "completion"))
            corpus = [f"{prompts[row].strip()}\n{completions[row].strip()}" for row in taken]
            table = table.take(np.array(sorted(set(order.tolist()) - set(taken))))
            # So that a limit is a sample of all tasks.
            table = table.take(Rng(0).numpy("rows").permutation(table.num_rows))
        table = table.filter(pyarrow.compute.is_in(table["task"], pyarrow.array(TASKS)))
        target.mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(table, target / f"{part}.parquet")
    return corpus


def make_tokenizer(corpus: list[str]) -> Any:
    """Byte pairs of the plain text; a text begins with <begin> and ends with <end>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    pairs = Tokenizer(models.BPE())
    pairs.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    pairs.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<begin>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pairs.train_from_iterator(corpus, trainer)
    pairs.post_processor = processors.TemplateProcessing(single="<begin> $A", special_tokens=[("<begin>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=pairs, bos_token="<begin>", eos_token="<end>")


def pack(tokenizer: Any, corpus: list[str]) -> Tensor:
    """All texts one after the other, in blocks of equal length; shape (num_blocks, BLOCK)."""
    ids = [token for text in corpus for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    num_blocks = len(ids) // BLOCK
    return torch.tensor(ids[: num_blocks * BLOCK]).view(num_blocks, BLOCK)


def pretrain(size: str, blocks: Tensor, tokenizer: Any, arguments: argparse.Namespace) -> None:
    """Pre-train one size, and save it after each degree."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = arguments.out / "models" / size
    num_steps = math.ceil(arguments.epochs * len(blocks) / BATCH)
    ends = {math.ceil(num_steps / part): degree for degree, part in DEGREES.items()}
    if all((folder / degree / "model.safetensors").exists() for degree in DEGREES):
        print(f"{size}: is there already")
        return
    settings = SIZES[size]
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        intermediate_size=3 * settings["hidden_size"],
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        **settings,
    )
    with Rng(0).ambient("base", size):
        model = LlamaForCausalLM(config).to(arguments.device)
    print(f"{size}: {sum(p.numel() for p in model.parameters())} parameters, {num_steps} steps")
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    progress = folder / "progress.safetensors"
    start = resume(progress, model, optimizer)
    per_epoch = math.ceil(len(blocks) / BATCH)
    began, sum_loss = time.monotonic(), 0.0
    for step in range(start, num_steps):
        epoch, place = divmod(step, per_epoch)
        order = torch.randperm(len(blocks), generator=Rng(0).torch("order", epoch))
        batch = blocks[order[place * BATCH : (place + 1) * BATCH]].to(arguments.device)
        optimizer.param_groups[0]["lr"] = arguments.learning_rate * min(1.0, (step + 1) / WARMUP)
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        sum_loss += loss.item()
        done = step + 1
        if done % SAVED_EVERY == 0:
            write_atomically(progress, state_of(model, optimizer, done))
            speed = (done - start) * batch.numel() / (time.monotonic() - began)
            mean = sum_loss / SAVED_EVERY
            print(f"{size}: step {done} of {num_steps}, loss {mean:.3f}, {speed:.0f} tokens/s", flush=True)
            sum_loss = 0.0
        if done in ends:
            model.save_pretrained(folder / ends[done])
            tokenizer.save_pretrained(folder / ends[done])
    progress.unlink(missing_ok=True)


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> bytes:
    """Weights and moments, as safetensors."""
    named = list(model.named_parameters())
    values: dict[str, Any] = {f"weight/{name}": p.detach().cpu() for name, p in named}
    for kind in ("exp_avg", "exp_avg_sq"):
        values.update({f"{kind}/{name}": optimizer.state[p][kind].cpu() for name, p in named})
    return Payload({**values, "step": step}).encode()


def resume(progress: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Put back what :func:`state_of` kept; return the number of steps that are done."""
    if not progress.exists():
        return 0
    kept = Payload.decode(progress.read_bytes())
    step = int(kept.number("step"))
    for name, p in model.named_parameters():
        p.data.copy_(kept.tensor(f"weight/{name}"))
        moments = {kind: kept.tensor(f"{kind}/{name}").to(p.device) for kind in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(float(step)), **moments}
    return step


if __name__ == "__main__":
    main()
