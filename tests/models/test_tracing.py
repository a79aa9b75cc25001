"""Graphs of modules: one input, parts that cannot be traced as they are, and no mode baked in."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.errors import ModelError
from fedfuse.models.tracing import run, submodule, trace


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.layer(x if mask is None else x * mask)


class Branching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) if x.sum() > 0 else x


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 3), Branching())
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).relu())


class Mode(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


def test_arguments_with_defaults_are_no_inputs() -> None:
    assert [node.op for node in trace(Masked()).nodes] == ["placeholder", "call_module", "output"]


def test_a_part_that_branches_is_taken_as_it_is_and_the_rest_is_seen() -> None:
    targets = [str(node.target) for node in trace(Around()).nodes]
    assert targets == ["x", "inner.0", "inner.1", "relu", "head", "output"]


def test_a_forward_that_branches_on_numbers_is_refused() -> None:
    with pytest.raises(ModelError) as caught:
        trace(Branching())
    assert caught.value.what == (
        "the model cannot be traced: TraceError: symbolically traced variables cannot be used as inputs to control flow"
    )
    assert caught.value.fix == (
        "write it as an nn.Sequential of its blocks, or without control flow that depends on the input"
    )


@pytest.mark.parametrize("training", [True, False])
def test_a_mode_that_would_be_baked_in_is_refused(training: bool) -> None:
    with pytest.raises(ModelError) as caught:
        trace(Mode().train(training))
    assert caught.value.what == (
        'the model behaves differently in training and in evaluation at "dropout", which cannot be traced'
    )
    trace(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))


def test_running_keeps_values_and_leaves_modes_and_buffers_alone() -> None:
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    module[1].eval()
    before = module[1].running_mean.clone()  # type: ignore[operator, union-attr]
    graph = trace(module)
    values = run(module, graph, torch.ones(5, 3))
    assert [tuple(value.shape) for value in values.values()] == [(5, 3), (5, 4), (5, 4), (5, 2), (5, 2)]
    assert [part.training for part in module.modules()] == [True, True, False, True]
    assert torch.equal(module[1].running_mean, before)  # type: ignore[arg-type]
    nodes = list(graph.nodes)
    assert submodule(module, nodes[0]) is None
    assert submodule(module, nodes[1]) is module[0]


def test_an_input_that_does_not_fit_is_explained() -> None:
    module = nn.Sequential(nn.Linear(3, 2))
    with pytest.raises(ModelError) as caught:
        run(module, trace(module), torch.ones(5, 7))
    assert caught.value.what.startswith("the model cannot take an input of shape (7,): mat1 and mat2 shapes")
    assert caught.value.fix == "check the shape of the data and the first layer of the model"
