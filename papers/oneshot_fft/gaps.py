"""What one round loses against several, by base model, from a comparison over `model.path`.

Losses are those of the completions of the test part, in nats per token: before any fine-tuning (base), after one round
and after several. The gap is one round minus several rounds; its share is the gap over what several rounds gained.
For LoRA also: how large a client's update of one round is against the weights that it changes, and the mean cosine
between two clients' updates. With --scales the exact mean of the clients' updates (FLoRA's) is multiplied by each of
these numbers before it is added, and the loss of that is printed instead.

    python papers/oneshot_fft/gaps.py runs/oneshot_fft/language ["one round" "four rounds"]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import torch

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.payload import PayloadFile
from fedfuse.experiment import read_config
from fedfuse.experiment.setting import Loader, Setting
from fedfuse.models.foundation import Foundation, lora_layout
from fedfuse.ops.lora import Factors, inner_product, stacked
from fedfuse.training import evaluate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("methods", nargs="*", default=["one round", "four rounds"])
    parser.add_argument("--scales", default="", help="such as 1,2,4")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = json.loads((arguments.folder / "board.json").read_text())["rows"]
    once, often = arguments.methods
    if arguments.scales:
        along(arguments.folder, [row for row in rows if row["method"] == once], arguments.scales.split(","))
        return
    names = ["parameters", "base", once, often, "gap", "share of the gain", "accuracy, %", "exact match, %"]
    names += ["relative update", "cosine"]
    print("| base model | " + " | ".join(names) + " |\n|:---" + "|---:" * len(names) + "|")
    for path in dict.fromkeys(str(row["varied"]["model.path"]) for row in rows):
        own = {row["method"]: row for row in rows if row["varied"]["model.path"] == path}
        if {once, often} <= set(own):
            print(line(arguments.folder, own[once], own[often]))


def along(folder: Path, rows: list[dict[str, Any]], scales: list[str]) -> None:
    """Print the losses of the scaled mean, means over seeds."""
    print("| base model | " + " | ".join(f"x {scale}" for scale in scales) + " |\n|:---" + "|---:" * len(scales) + "|")
    for row in rows:
        losses = [losses_along(folder / run, [float(scale) for scale in scales]) for run in row["runs"]]
        means = [f"{statistics.mean(values):.3f}" for values in zip(*losses, strict=True)]
        print("| " + " | ".join([base_name(row), *means]) + " |", flush=True)


def base_name(row: dict[str, Any]) -> str:
    """Size and degree of pre-training."""
    return " ".join(Path(str(row["varied"]["model.path"])).parts[-2:])


def line(folder: Path, once: dict[str, Any], often: dict[str, Any]) -> str:
    """One line of the table: means and sample standard deviations over seeds."""
    results = [[json.loads((folder / run / "result.json").read_text()) for run in row["runs"]] for row in (once, often)]
    losses = [[result["loss"] for result in one] for one in results]
    setting = Loader(read_config(folder / once["runs"][0] / "config.yaml")).setting(0)
    base, num_parameters = untrained(setting)
    gaps = [a - b for a, b in zip(*losses, strict=True)]
    shares = [100 * gap / (base - b) for gap, b in zip(gaps, losses[1], strict=True)]
    cells = [
        base_name(once),
        f"{num_parameters:,}",
        f"{base:.3f}",
        *(spread(values, 3) for values in losses),
        spread(gaps, 3),
        spread(shares, 1) + " %",
    ]
    for score in (lambda result: result["accuracy"], lambda result: result["metrics"].get("exact_match", 0.0)):
        cells.append(" / ".join(f"{100 * statistics.mean(map(score, one)):.1f}" for one in results))
    has_lora = "lora" in str(setting.model.recipe)
    moves = [size_and_angle(folder / run, setting.model) for run in once["runs"] if has_lora]
    cells += [f"{statistics.mean(values):.3f}" for values in zip(*moves, strict=True)] or ["", ""]
    return "| " + " | ".join(cells) + " |"


def spread(values: list[float], digits: int) -> str:
    """Mean and, of several, the sample standard deviation."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"


def untrained(setting: Setting) -> tuple[float, int]:
    """Loss of the base model on the test part, and its number of parameters; a new LoRA adapter changes nothing."""
    module = setting.model.build()
    assert setting.data.test is not None
    loss = evaluate(module, setting.data.test).loss
    return loss, sum(p.numel() for name, p in module.named_parameters() if "lora_" not in name)


def size_and_angle(run: Path, model: ModelSpec) -> tuple[float, float]:
    """Norm of the clients' updates over that of the weights, and the cosine between two of them; means of one run."""
    module, changes = model.build(), list(updates(run, model).values())
    assert isinstance(module, Foundation)
    names = sorted(changes[0])
    weights = math.sqrt(sum(float(module.weight_of(name).detach().double().square().sum()) for name in names))
    norms = [math.sqrt(sum(inner_product(factors, factors) for factors in change.values())) for change in changes]
    cosines = [
        sum(inner_product(changes[i][name], changes[j][name]) for name in names) / (norms[i] * norms[j])
        for i, j in itertools.combinations(range(len(changes)), 2)
    ]
    return statistics.mean(norms) / weights, statistics.mean(cosines)


def updates(run: Path, model: ModelSpec) -> dict[str, dict[str, Factors]]:
    """What each client of a run in one round changed, module by module."""
    digests = json.loads((run / "artifact" / "fused.json").read_text())["info"]["uploads"]["local_models"]
    clients = {digest: client_id for client_id, digest in digests.items()}
    layout, found = lora_layout(model), {}
    for path in sorted((run.parents[1] / "journal").glob("*.json")):
        client_id = clients.get(json.loads(path.read_text())["sha256"])
        if client_id is not None:
            upload = PayloadFile(path.with_suffix(".safetensors"))
            state = {key.removeprefix("model/"): upload[key] for key in upload if key.startswith("model/")}
            found[client_id] = layout.factors(state)
    return found


def losses_along(run: Path, scales: list[float]) -> list[float]:
    """Test loss of the base plus the exact mean of the clients' updates, times each scale."""
    setting = Loader(read_config(run / "config.yaml")).setting(0)
    assert setting.data.test is not None
    changes = updates(run, setting.model)
    counts = {client_id: len(setting.data.clients[client_id].train) for client_id in changes}
    losses = []
    for scale in scales:
        module = setting.model.build()
        assert isinstance(module, Foundation)
        parts = [scale * counts[client_id] / sum(counts.values()) for client_id in changes]
        names = next(iter(changes.values()))
        module.add_to_base({name: stacked([change[name] for change in changes.values()], parts) for name in names})
        losses.append(evaluate(module, setting.data.test).loss)
    return losses


if __name__ == "__main__":
    main()
