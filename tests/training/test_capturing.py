"""Fisher information and Gram matrices of real layers against automatic differentiation, example by example."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedfuse.training.capturing import (
    Gradients,
    curvature,
    dense_layers,
    input_moments,
    input_rows,
    matrix_of,
    put_matrix,
)

CPU = torch.device("cpu")


def true_label(y: Tensor) -> Gradients:
    return lambda logits, index: (logits.softmax(1) - nn.functional.one_hot(y[index], logits.shape[1]))[None]


class Tokens(nn.Module):
    """Linear layers on tokens, one of them used twice, a norm, and a linear layer that only lends its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.lent = nn.Linear(4, 4)
        self.head = nn.Linear(4, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.mix(self.norm(self.mix(x))).relu()
        logits: Tensor = self.head((x @ self.lent.weight).mean(1))
        return logits


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(0)
    convolutional = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, stride=2, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 6, 3, padding="same", padding_mode="reflect"),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )
    convolutional(torch.randn(9, 2, 8, 8))
    return {
        "mlp": (nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(7, 5)),
        "cnn": (convolutional, torch.randn(7, 2, 8, 8)),
        "tokens": (Tokens(), torch.randn(7, 6, 4)),
        "one layer": (nn.Linear(5, 3), torch.randn(7, 5)),
    }


@pytest.mark.parametrize("which", list(networks()))
@pytest.mark.parametrize("batch_size", [2, 64])
def test_the_diagonal_is_the_mean_squared_gradient_of_each_example(which: str, batch_size: int) -> None:
    module, x = networks()[which]
    y = torch.arange(len(x)) % 3
    names = list(dense_layers(module, x))
    found = curvature(module, x, names, true_label(y), device=CPU, kronecker=False, batch_size=batch_size)
    assert set(found.diagonal) == {name for name, _ in module.named_parameters()}
    for i in range(len(x)):
        loss = nn.functional.cross_entropy(module(x[i : i + 1]), y[i : i + 1])
        gradients = torch.autograd.grad(loss, list(module.parameters()), allow_unused=True)
        for (name, _), gradient in zip(module.named_parameters(), gradients, strict=True):
            if gradient is not None:
                found.diagonal[name] = found.diagonal[name] - gradient.double().square() / len(x)
    for name, rest in found.diagonal.items():
        torch.testing.assert_close(rest, torch.zeros_like(rest), rtol=0, atol=1e-6, msg=name)


def test_the_layers_that_inputs_pass_through() -> None:
    found = {name: list(dense_layers(module, x)) for name, (module, x) in networks().items()}
    assert found == {"mlp": ["0", "2"], "cnn": ["0", "3", "8"], "tokens": ["mix", "head"], "one layer": [""]}


def test_tied_weights_are_left_out() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    assert list(dense_layers(module, torch.randn(2, 4))) == []


def test_kronecker_factors_of_a_linear_model() -> None:
    module, x = nn.Linear(4, 3), torch.randn(6, 4)
    y = torch.arange(6) % 3
    found = curvature(module, x, [""], true_label(y), device=CPU, kronecker=True, batch_size=4)
    rows = torch.cat([x, torch.ones(6, 1)], 1)
    gradients = (module(x).softmax(1) - nn.functional.one_hot(y)).detach()
    assert found.diagonal == {}
    torch.testing.assert_close(found.inputs[""], (rows.T @ rows).double() / 6)
    torch.testing.assert_close(found.gradients[""], (gradients.T @ gradients).double() / 6)


def test_kronecker_factors_of_a_convolution_with_one_position_are_those_of_the_linear_layer() -> None:
    convolution, x = nn.Conv2d(2, 3, 2), torch.randn(6, 2, 2, 2)
    linear = nn.Linear(8, 3)
    linear.load_state_dict({"weight": convolution.weight.flatten(1), "bias": convolution.bias})
    y = torch.arange(6) % 3
    both = [
        curvature(
            nn.Sequential(*layers), x, ["0" if len(layers) == 2 else "1"], true_label(y), device=CPU, kronecker=True
        )
        for layers in ([convolution, nn.Flatten()], [nn.Flatten(), linear, nn.Identity()])
    ]
    torch.testing.assert_close(both[0].inputs["0"], both[1].inputs["1"])
    torch.testing.assert_close(both[0].gradients["0"], both[1].gradients["1"])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 5, 3),
        nn.Conv2d(2, 5, (3, 2), stride=2, padding=1, dilation=2, bias=False),
        nn.Conv2d(2, 5, 3, padding="same", padding_mode="circular"),
        nn.Linear(8, 5),
    ],
)
def test_rows_times_the_matrix_are_the_layer(layer: nn.Module) -> None:
    x = torch.randn(3, 2, 8, 8)
    rows = input_rows(layer, x)
    found = rows @ matrix_of(layer.state_dict(), "").T
    wanted = layer(x)
    if isinstance(layer, nn.Conv2d):
        wanted = wanted.flatten(2).mT
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_input_moments_are_sums_over_positions_per_example() -> None:
    module, x = networks()["tokens"]
    found = input_moments(module, x, ["head", "mix"], device=CPU, batch_size=3)
    assert {name: tuple(t.shape) for name, t in found.items()} == {"head": (4, 4), "mix": (5, 5)}
    # The layer is used twice, each time on six tokens; the last input is always 1.
    assert found["mix"][4, 4].item() == 12
    assert found["mix"].dtype == torch.float64


def test_a_matrix_is_put_back_as_weight_and_bias() -> None:
    state = {f"a.{k}": v for k, v in nn.Conv2d(2, 3, 2).state_dict().items()}
    before = {key: tensor.clone() for key, tensor in state.items()}
    put_matrix(state, "a", 2 * matrix_of(state, "a").double())
    assert all(state[key].equal(2 * tensor) and state[key].dtype == tensor.dtype for key, tensor in before.items())
