"""Fusing the adapters of a 1B-size model: seconds and peak memory of a fresh process, beside a plain loop.

Makes synthetic LoRA adapters with the shapes of a Llama of 1.2 billion parameters, all seven kinds of linear layers, in
a temporary folder, and fuses them in processes of their own. ``plain loop`` does what the published code of FLoRA does,
written anew here: every adapter is loaded whole, the weight goes on A, factors are concatenated to the result so far,
and the result is saved at the end, in the adapters' own precision and without looking at scales, ranks or NaN.
It has one thread; fedfuse fuses the next weight in a second one while it writes the last, and hashes in a third.
``bare`` means without the error of every weight and without the SHA-256 of the inputs, which the loop lacks too.

    python benchmarks/fusing_adapters.py [--adapters 10] [--rank 16] [--layers 16] [--threads 1] [--rules flora,svd]
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from fedfuse.fusing import fuse_adapters

_WIDTH, _KV, _INNER = 2048, 512, 8192
SHAPES = {
    "self_attn.q_proj": (_WIDTH, _WIDTH),
    "self_attn.k_proj": (_KV, _WIDTH),
    "self_attn.v_proj": (_KV, _WIDTH),
    "self_attn.o_proj": (_WIDTH, _WIDTH),
    "mlp.gate_proj": (_INNER, _WIDTH),
    "mlp.up_proj": (_INNER, _WIDTH),
    "mlp.down_proj": (_WIDTH, _INNER),
}


def make(folder: Path, num_adapters: int, rank: int, num_layers: int) -> list[Path]:
    """Write adapters as PEFT would."""
    paths = []
    for number in range(num_adapters):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for layer in range(num_layers):
            for name, (height, width) in SHAPES.items():
                stem = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, width, generator=generator) / width**0.5
                tensors[f"{stem}.lora_B.weight"] = torch.randn(height, rank, generator=generator) / 100
        paths.append(folder / f"adapter-{number}")
        paths[-1].mkdir()
        save_file(tensors, paths[-1] / "adapter_model.safetensors", metadata={"format": "pt"})
        config = {
            "peft_type": "LORA",
            "base_model_name_or_path": "synthetic-1b",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": sorted(name.rpartition(".")[2] for name in SHAPES),
            "task_type": "CAUSAL_LM",
        }
        (paths[-1] / "adapter_config.json").write_text(json.dumps(config))
    return paths


def plain_loop(paths: list[Path], weights: list[float], out: Path) -> None:
    """Load, weigh, concatenate, save."""
    result: dict[str, torch.Tensor] = {}
    for path, weight in zip(paths, weights, strict=True):
        for key, tensor in load_file(path / "adapter_model.safetensors").items():
            value = tensor * weight if "lora_A" in key else tensor
            result[key] = torch.cat([result[key], value], int("lora_B" in key)) if key in result else value
    out.mkdir()
    save_file({key: tensor.contiguous() for key, tensor in result.items()}, out / "adapter_model.safetensors")


def peak_kib() -> int:
    """Most resident memory of this process so far, mapped files counted in."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])  # type: ignore[index]


def child(rule: str, folder: Path, out: Path, num_threads: int) -> None:
    """Fuse once in this process and print what it took."""
    torch.set_num_threads(num_threads)
    paths = sorted(folder.glob("adapter-*"))
    weights = [float(number + 1) for number in range(len(paths))]
    before, start = peak_kib(), time.perf_counter()
    if rule == "plain loop":
        plain_loop(paths, [weight / sum(weights) for weight in weights], out)
        error = None
    else:
        name, _, how = rule.partition(" ")
        is_bare = how == "bare"
        error = fuse_adapters(paths, weights=weights, method=name, out=out, measures=not is_bare, hashes=not is_bare)
        error = error.error.relative if error.errors else None
    seconds = time.perf_counter() - start
    print(json.dumps({"seconds": seconds, "peak_kib": peak_kib(), "before_kib": before, "error": error}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=10)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rules", default="plain loop,flora bare,flora,average,svd,fedex")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    words = parser.parse_args()
    if words.child:
        child(words.child[0], words.folder, Path(words.child[1]), words.threads)
        return
    environment = {**os.environ, "OMP_NUM_THREADS": str(words.threads)}
    found: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        paths = make(folder, words.adapters, words.rank, words.layers)
        size = sum((path / "adapter_model.safetensors").stat().st_size for path in paths)
        print(
            f"{words.adapters} adapters of rank {words.rank}, {size / 1e6:.0f} MB together, {words.threads} thread(s)"
        )
        # In turn, so that a busy machine slows all alike.
        for repeat in range(words.repeats):
            for rule in words.rules.split(","):
                out = folder / f"out-{repeat}"
                command = [sys.executable, __file__, "--child", rule, str(out), "--folder", name]
                command += ["--threads", str(words.threads)]
                done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                found.setdefault(rule, []).append(json.loads(done.stdout.splitlines()[-1]))
                for path in sorted(out.rglob("*"), reverse=True):
                    path.unlink()
                out.rmdir()
    print(f"{'rule':<20}{'seconds':>9}{'peak MB':>9}{'of it before':>14}{'error':>11}")
    for rule, rows in found.items():
        peak, before = (max(row[key] for row in rows) * 1024 / 1e6 for key in ("peak_kib", "before_kib"))
        error = "" if rows[0]["error"] is None else f"{rows[0]['error']:.1e}"
        print(f"{rule:<20}{statistics.median(r['seconds'] for r in rows):>9.2f}{peak:>9.0f}{before:>14.0f}{error:>11}")


if __name__ == "__main__":
    main()
