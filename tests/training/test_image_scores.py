"""Scores of drawings by a judge whose answers are known, and what a sheet holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedfuse.core.artifact import Artifact
from fedfuse.core.errors import ConfigError
from fedfuse.core.examples import Examples
from fedfuse.core.judging import Draws, Evaluation
from fedfuse.core.seeding import Rng
from fedfuse.models import spec
from fedfuse.ops.frechet import frechet_distance
from fedfuse.training.evaluation import evaluate
from fedfuse.training.image_scores import features_of, image_scores, open_judge, sheet


class Judge(nn.Module):
    """Sees the four pixels of a picture, and answers whether the first or the last is brighter."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 2, bias=False)
        self.head.weight.data = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1]])

    def forward(self, x: Tensor) -> Tensor:
        answer: Tensor = self.head(x.flatten(1))
        return answer


class Painter(nn.Module):
    """Draws noise in the upper half, and the class of the caption as the brighter corner, but for class 2."""

    def __init__(self, judge_path: str = "", num_drawn: int = 6) -> None:
        super().__init__()
        self.judge_path, self.num_drawn = judge_path, num_drawn
        self.bias = nn.Parameter(torch.zeros(1))

    def judge(self, examples: Examples, *, device: torch.device | str = "cpu") -> Evaluation:
        return Evaluation(0.5, 2.0, metrics={"denoising_loss": 2.0})

    def draw(self, x: Tensor, rng: Rng) -> Tensor:
        drawn = torch.rand(len(x), 1, 2, 2, generator=rng.torch("noise")) * 0.1
        drawn[:, 0, 0, 0] += (x[:, 4] == 0).float() / 2
        drawn[:, 0, 1, 1] += (x[:, 4] == 1).float() / 2
        return drawn

    def pictures_of(self, x: Tensor) -> Tensor:
        return x[:, :4].reshape(-1, 1, 2, 2)


def pictures(n: int) -> Examples:
    y = torch.arange(n) % 3
    return Examples(torch.cat([torch.rand(n, 4, generator=torch.Generator().manual_seed(0)), y[:, None]], 1), y)


def test_scores_by_hand() -> None:
    drawings = torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 1], [1, 0, 0, 0]]).reshape(3, 1, 2, 2)
    real = pictures(5).x[:, :4].reshape(5, 1, 2, 2)
    order = torch.randperm(5, generator=Rng(0).torch("rows that are judged"))
    found = image_scores(Judge(), drawings, torch.tensor([0, 1, 1]), real)
    assert found == {
        "recognised": pytest.approx(2 / 3),
        "feature_distance": frechet_distance(drawings.flatten(1), real.flatten(1)),
        "feature_distance_real": frechet_distance(*real[order].flatten(1).chunk(2)),
    }
    assert set(image_scores(Judge(), drawings[:1], torch.tensor([0]), real[:1])) == {"recognised"}


def test_features_are_what_the_last_layer_sees() -> None:
    x = pictures(4).x[:, :4].reshape(4, 1, 2, 2)
    logits, features = features_of(Judge(), x)
    assert torch.equal(features, x.flatten(1))
    assert torch.equal(logits, x.flatten(1)[:, [0, 3]])


def test_a_sheet_has_a_line_for_each_class() -> None:
    drawings = torch.arange(7.0).reshape(7, 1, 1, 1)
    found = sheet(drawings, torch.tensor([4, 1, 4, 1, 1, 4, 4]))
    assert found.classes == (1, 4)
    assert found.drawings.flatten(2).squeeze(2).tolist() == [[1, 3, 4], [0, 2, 5]]
    assert sheet(torch.zeros(40, 1, 1, 1), torch.arange(40) % 2).drawings.shape[:2] == (2, 8)


def test_drawings_are_judged_when_asked_for(tmp_path: Path) -> None:
    network = spec("mlp", {"width": 4, "depth": 1}, input_shape=(1, 2, 2), num_classes=3, seed=0)
    folder = Artifact.of(network, network.build().state_dict()).save(tmp_path / "judge")
    painter, examples = Painter(str(folder)), pictures(12)
    assert isinstance(painter, Draws)
    seen = evaluate(painter, examples, writes_answers=True)
    assert evaluate(painter, examples) == Evaluation(0.5, 2.0, metrics={"denoising_loss": 2.0})
    # Six captions, drawn once for all models.
    order = torch.randperm(12, generator=Rng(0).torch("rows that are judged"))
    rows = examples.subset(sorted(order[:6].tolist()))
    drawings = painter.draw(rows.x, Rng(0).child("drawings"))
    wanted = image_scores(open_judge(str(folder)), drawings, rows.y, painter.pictures_of(examples.x))
    assert seen.metrics == {"denoising_loss": 2.0, **wanted}
    assert seen.accuracy == wanted["recognised"]
    assert seen.loss == 2.0
    shown = seen.pictures["drawings"]
    assert shown.classes == (0, 1, 2)
    assert torch.equal(shown.drawings[1], drawings[rows.y == 1])


def test_without_a_judge_there_is_only_a_sheet() -> None:
    seen = evaluate(Painter(), pictures(12), writes_answers=True)
    assert (seen.accuracy, list(seen.metrics), list(seen.pictures)) == (0.5, ["denoising_loss"], ["drawings"])
    assert not evaluate(Painter(num_drawn=0), pictures(12), writes_answers=True).pictures


def test_judges_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        open_judge(str(tmp_path))
    assert error.value.what.startswith("the judge cannot be used: this is no artifact")
    assert error.value.fix == "name the folder of a run that trained a classifier of such pictures"
    wrong: list[tuple[Any, str]] = [
        (nn.Flatten(), "the judge has no linear layer"),
        (Judge(), "the judge does not take pictures of 1 x 3 x 3"),
    ]
    for judge, what in wrong:
        with pytest.raises(ConfigError) as error:
            features_of(judge, torch.zeros(1, 1, 3, 3))
        assert error.value.what == what
