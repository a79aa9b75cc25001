"""Text-to-image models in a federation: what is averaged, what is written, what the page shows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from PIL import Image
from pyarrow import parquet

import fedfuse
from fedfuse.core.errors import ConfigError
from fedfuse.core.journal import Journal
from fedfuse.core.payload import Payload
from fedfuse.report import write_report

pytest.importorskip("diffusers")
pytest.importorskip("peft")

TEXT_ENCODER = {
    "vocab_size": 12,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 4,
}
UNET = {
    "sample_size": 4,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "mid_block_type": None,
    "up_block_types": ["CrossAttnUpBlock2D"],
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}


def _png(grey: int) -> bytes:
    import io

    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4), grey, np.uint8)).save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Dark and light squares, three clients, a tiny UNet with LoRA."""
    monkeypatch.setenv("FEDFUSE_CACHE", str(tmp_path / "cache"))
    for part, count in (("train", 30), ("test", 12)):
        rows = [
            {"image": {"bytes": _png(200 * (k % 2) + k), "path": ""}, "label": ["dark", "light"][k % 2]}
            for k in range(count)
        ]
        (tmp_path / "squares").mkdir(exist_ok=True)
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "squares" / f"{part}-0.parquet")
    return {
        "data": {
            "source": "captioned",
            "path": str(tmp_path / "squares"),
            "templates": ["a {class} square"],
            "max_length": 4,
            "validation_fraction": 0.0,
            "partition": {"scheme": "quantity_skew", "num_clients": 3, "min_examples": 4},
        },
        "model": {
            "family": "diffusers",
            "config": {"unet": UNET, "text_encoder": TEXT_ENCODER},
            "peft": {"kind": "lora", "rank": 2},
            "num_inference_steps": 2,
            "num_drawn": 12,
        },
        "method": {"name": "fedit", "local": {"num_epochs": 1, "batch_size": 8, "optimizer": "adamw"}},
        "server": {"threads": 1},
    }


def test_one_round_is_the_weighted_mean_of_the_adapters(config: dict[str, Any], tmp_path: Path) -> None:
    result = fedfuse.run(config, out=tmp_path / "run")
    assert result.artifact is not None
    state = result.artifact.state
    assert state
    assert all(".lora_A." in name or ".lora_B." in name for name in state)
    counts = {c: facts["num_examples"] for c, facts in result.clients.items()}
    assert sum(counts.values()) == 30
    with Journal(tmp_path / "run" / "journal") as journal:
        uploads = {entry.facts["client"]: entry.payload() for entry in journal.entries()}
    assert set(uploads) == set(counts)
    for name, tensor in state.items():
        mean = sum(counts[c] / 30 * uploads[c].tensor(f"model/{name}").double() for c in counts)
        torch.testing.assert_close(tensor.double(), mean, rtol=0, atol=1e-6)
    # The upload is the adapter: 2 x 24 factors of rank 2, between 8 or 16 and 8.
    assert sum(t.numel() for t in state.values()) * 4 < result.ledger["upload_bytes"] < 30_000


def test_what_a_run_writes_and_shows(config: dict[str, Any], tmp_path: Path) -> None:
    result = fedfuse.run(config, out=tmp_path / "run")
    facts = json.loads((tmp_path / "run" / "result.json").read_text())
    assert set(facts["metrics"]) == {"denoising_loss", "noise_explained"}
    assert facts["loss"] == pytest.approx(facts["metrics"]["denoising_loss"])
    assert facts["confusion"] is None
    drawn = Payload.decode((tmp_path / "run" / "pictures" / "drawings.safetensors").read_bytes())
    assert json.loads(drawn.text("lines")) == ["dark", "light"]
    assert drawn.tensor("images").shape == (12, 1, 4, 4)
    assert drawn.tensor("images").dtype == torch.uint8
    page = write_report(tmp_path / "run").read_text()
    assert "What the model draws" in page
    assert "What the method made" not in page
    assert "a line for each class: dark, light" in page
    # The artifact draws without the run's configuration.
    module = fedfuse.load(tmp_path / "run" / "artifact")
    assert result.artifact is not None
    x = torch.zeros(2, 16 + 4)
    torch.testing.assert_close(module(x), result.artifact.module()(x))


def test_a_comparison_shows_all_sheets(config: dict[str, Any], tmp_path: Path) -> None:
    config["methods"] = ["fedit", {"name": "fedavg", "label": "mean"}]
    fedfuse.compare(config, out=tmp_path / "board")
    page = write_report(tmp_path / "board").read_text()
    assert page.count("a line for each class: dark, light") >= 2
    assert "What the models draw" in page


def test_a_judge_scores_the_drawings(config: dict[str, Any], tmp_path: Path) -> None:
    path = config["data"]["path"]
    judge = fedfuse.run(
        {
            "data": {"source": "parquet", "path": path, "partition": {"scheme": "iid", "num_clients": 1}},
            "model": {"family": "mlp", "width": 8, "depth": 1},
            "method": {"name": "centralized", "local": {"num_epochs": 20, "batch_size": 8, "learning_rate": 0.1}},
            "server": {"threads": 1},
        },
        out=tmp_path / "judge",
    )
    assert judge.accuracy == 1
    config["model"]["judge"] = str(tmp_path / "judge")
    result = fedfuse.run(config, out=tmp_path / "run")
    metrics = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    assert result.accuracy == metrics["recognised"]
    assert metrics["feature_distance"] > metrics["feature_distance_real"] > 0


def test_a_judge_that_does_not_fit_is_told_before_anybody_trains(config: dict[str, Any], tmp_path: Path) -> None:
    config["model"]["judge"] = str(tmp_path / "gone")
    with pytest.raises(ConfigError) as error:
        fedfuse.run(config, out=tmp_path / "run")
    assert error.value.what.startswith("the judge cannot be used: this is no artifact")
    assert error.value.where == f"model.judge: {tmp_path / 'gone'}"
    fedfuse.run(
        {
            "data": {"source": "digits", "partition": {"scheme": "iid", "num_clients": 1}, "limit": 50},
            "model": {"family": "mlp", "width": 8, "depth": 1},
            "method": {"name": "centralized", "local": {"num_epochs": 1}},
            "server": {"threads": 1},
        },
        out=tmp_path / "digits",
    )
    config["model"]["judge"] = str(tmp_path / "digits")
    with pytest.raises(ConfigError) as error:
        fedfuse.run(config, out=tmp_path / "run")
    assert error.value.what == "the judge does not take pictures of 1 x 4 x 4"
