"""Draw the pictures of the documentation again: python docs/pictures.py (after make demo).

The picture of the guide to privacy is drawn where the guide's three comparisons are in runs/.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from fedfuse.core.registry import PARTITIONS, SOURCES
from fedfuse.data.federate import federate
from fedfuse.report import partition_gallery
from fedfuse.report.plots import save_figure
from fedfuse.report.plots.accuracy import percent_axis
from fedfuse.report.plots.style import MUTED, PALETTE, PAPER, in_house_style, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HERE = Path(__file__).resolve().parent
RUNS = HERE.parent / "runs"
SCHEMES = {
    "iid": ("iid", {}),
    "dirichlet, alpha 1": ("dirichlet", {"dirichlet_alpha": 1.0}),
    "dirichlet, alpha 0.1": ("dirichlet", {"dirichlet_alpha": 0.1}),
    "embedding, alpha 0.1": ("embedding", {"dirichlet_alpha": 0.1}),
    "shards, 2 per client": ("shards", {"num_shards_per_client": 2}),
    "quantity_skew": ("quantity_skew", {}),
    "long_tail, factor 50": ("long_tail", {"imbalance_factor": 50}),
}


MECHANISMS = {
    "central": "central: noise in the mean",
    "trained": "trained: DP-SGD, one example",
    "local": "local: noise in every upload",
}


@in_house_style
def accuracy_against_epsilon() -> Figure:
    """A line for each mechanism, from the boards of the guide's comparisons."""
    boards = {name: json.loads((RUNS / f"privacy-{name}" / "board.json").read_text()) for name in ("noise", "trained")}
    plain = json.loads((RUNS / "privacy-plain" / "board.json").read_text())["rows"][0]["accuracy_mean"]
    figure = new_figure(3.6)
    axes = figure.subplots()
    axes.axhline(plain, color=MUTED, linewidth=1.2, linestyle=(0, (4, 3)), label="no privacy")
    for (mechanism, title), colour, marker in zip(MECHANISMS.items(), PALETTE, "osD", strict=False):
        rows = [row for board in boards.values() for row in board["rows"]]
        points = {}
        for row in rows:
            varied = row["varied"]
            if varied.get("privacy.mechanism", "trained") == mechanism:
                epsilon = varied.get("privacy.epsilon", varied.get("method.local.privacy.epsilon"))
                points[epsilon] = (row["accuracy_mean"], row["accuracy_std"])
        epsilons = sorted(points)
        means, spreads = zip(*(points[epsilon] for epsilon in epsilons), strict=True)
        axes.errorbar(
            epsilons,
            means,
            yerr=spreads,
            color=colour,
            marker=marker,
            markeredgecolor=PAPER,
            markersize=7,
            elinewidth=1.0,
            label=title,
        )
    axes.set_xscale("log")
    axes.set_xticks(epsilons, [str(epsilon) for epsilon in epsilons], minor=False)
    axes.minorticks_off()
    axes.set_xlabel("epsilon, at delta 1e-05")
    axes.set_ylabel("test accuracy")
    axes.set_ylim(0, 1)
    percent_axis(axes, "y")
    axes.grid(axis="y")
    axes.legend(loc="lower right")
    return figure


def main() -> None:
    digits = SOURCES.get("digits")().load()
    counts = {
        title: federate(digits, PARTITIONS.get(name)(num_clients=5, **settings), seed=0).label_counts()
        for title, (name, settings) in SCHEMES.items()
    }
    save_figure(partition_gallery(counts), HERE / "images", "partitions")
    if all((RUNS / f"privacy-{name}" / "board.json").exists() for name in ("noise", "trained", "plain")):
        save_figure(accuracy_against_epsilon(), HERE / "images", "privacy")
    demo = RUNS / "demo" / "figures" / "accuracy-against-upload.png"
    if demo.exists():
        shutil.copy(demo, HERE / "images" / "demo.png")


if __name__ == "__main__":
    main()
