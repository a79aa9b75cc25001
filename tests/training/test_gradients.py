"""The mean gradient over many examples."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedfuse.core.examples import Examples
from fedfuse.training.gradients import mean_gradient


class Line(nn.Module):
    """y = w x with half the squared error, and dropout that must not show."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([2.0]))
        self.unused = nn.Parameter(torch.zeros(3))
        self.dropout = nn.Dropout(0.5)

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (self.dropout(x[:, 0]) * self.w - y).square().mean()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 10])
def test_by_hand_whatever_the_batches(batch_size: int) -> None:
    # Residuals 2*1-1 = 1, 2*2-1 = 3, 2*3-2 = 4, times x: 1, 6, 12; their mean is 19/3.
    examples = Examples(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([1, 1, 2]))
    module = Line()
    found = mean_gradient(
        module, dict(module.named_parameters()), examples, device=torch.device("cpu"), batch_size=batch_size
    )
    assert found["w"].dtype == torch.float64
    assert found["w"].item() == pytest.approx(19 / 3)
    assert found["unused"].tolist() == [0, 0, 0]
    assert module.w.grad is None


def test_a_plain_classifier_learns_by_cross_entropy() -> None:
    module = nn.Linear(1, 2, bias=False)
    nn.init.zeros_(module.weight)
    # At zero both classes have probability 1/2: the gradient of the logits is (-1/2, 1/2) for class 0.
    found = mean_gradient(
        module,
        {"weight": module.weight},
        Examples(torch.tensor([[3.0]]), torch.tensor([0])),
        device=torch.device("cpu"),
        batch_size=8,
    )
    assert found["weight"].tolist() == [[-1.5], [1.5]]
