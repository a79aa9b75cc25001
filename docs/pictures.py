"""Draw the pictures of the documentation again: python docs/pictures.py (after make demo)."""

from __future__ import annotations

import shutil
from pathlib import Path

from fedfuse.core.registry import PARTITIONS, SOURCES
from fedfuse.data.federate import federate
from fedfuse.report import partition_gallery
from fedfuse.report.plots import save_figure

HERE = Path(__file__).resolve().parent
SCHEMES = {
    "iid": ("iid", {}),
    "dirichlet, alpha 1": ("dirichlet", {"dirichlet_alpha": 1.0}),
    "dirichlet, alpha 0.1": ("dirichlet", {"dirichlet_alpha": 0.1}),
    "shards, 2 per client": ("shards", {"num_shards_per_client": 2}),
    "quantity_skew": ("quantity_skew", {}),
    "long_tail, factor 50": ("long_tail", {"imbalance_factor": 50}),
}


def main() -> None:
    digits = SOURCES.get("digits")().load()
    counts = {
        title: federate(digits, PARTITIONS.get(name)(num_clients=5, **settings), seed=0).label_counts()
        for title, (name, settings) in SCHEMES.items()
    }
    save_figure(partition_gallery(counts), HERE / "images", "partitions")
    demo = HERE.parent / "runs" / "demo" / "figures" / "accuracy-against-upload.png"
    if demo.exists():
        shutil.copy(demo, HERE / "images" / "demo.png")


if __name__ == "__main__":
    main()
