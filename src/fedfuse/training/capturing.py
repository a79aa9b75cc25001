"""What goes through a model's linear and convolutional layers: inputs, and gradients of the outputs.

A convolution is a linear layer on its patches. So each layer's weight is a matrix ``(d_out, d_in)``, and each example
gives it some rows: one for a linear layer on vectors, one per token or per position otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

Gradients = Callable[[Tensor, Tensor], Tensor]
"""Logits and positions of the examples to gradients by the logits, shape ``(num_gradients, n, num_classes)``."""

_LARGEST = 1 << 24


@dataclass(frozen=True)
class Curvature:
    """Fisher information of a model on some examples, per example.

    Args:
        diagonal: parameter's name to the diagonal, of the parameter's shape.
        inputs: layer's name to the second moment of its inputs, shape ``(d_in, d_in)``; a bias counts as an input of 1.
        gradients: layer's name to the second moment of its outputs' gradients, shape ``(d_out, d_out)``.
    """

    diagonal: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)


def dense_layers(module: nn.Module, example: Tensor) -> dict[str, nn.Linear | nn.Conv2d]:
    """Linear and ungrouped two-dimensional convolutional layers that inputs really pass through.

    Layers whose weights are tied to others are left out, and so are layers that only lend their weights, and those
    of a frozen base, whose weights are no part of the module's state.

    Args:
        module: tried out in evaluation mode.
        example: inputs, shape ``(n, *input_shape)``.

    Returns:
        Name to layer, in the module's order.
    """
    state = module.state_dict()
    uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if (isinstance(layer, nn.Linear) or (isinstance(layer, nn.Conv2d) and layer.groups == 1))
        and uses[id(layer.weight)] == 1
        and (f"{name}.weight" if name else "weight") in state
    }
    module.eval()
    with torch.no_grad(), _captured(layers) as seen:
        module(example)
    # Rows that are no multiple of the examples belong to no single one of them.
    counts = {name: [part.shape[:-1].numel() for part in parts] for name, parts in seen.inputs.items()}
    return {n: layers[n] for n, found in counts.items() if found and not any(c % len(example) for c in found)}


def matrix_of(state: Mapping[str, Tensor], name: str) -> Tensor:
    """A layer's weight as a matrix, its bias as the last column.

    Args:
        state: state dict of a module.
        name: of the layer.

    Returns:
        Shape ``(d_out, d_in)``.
    """
    prefix = f"{name}." if name else ""
    weight = state[f"{prefix}weight"].flatten(1)
    bias = state.get(f"{prefix}bias")
    return weight if bias is None else torch.cat([weight, bias[:, None]], 1)


def put_matrix(state: dict[str, Tensor], name: str, matrix: Tensor) -> None:
    """Turn what :func:`matrix_of` gave back into weight and bias.

    Args:
        state: changed in place; the tensors of the layer are replaced.
        name: of the layer.
        matrix: shape ``(d_out, d_in)``.
    """
    prefix = f"{name}." if name else ""
    weight, bias = state[f"{prefix}weight"], state.get(f"{prefix}bias")
    width = weight[0].numel()
    state[f"{prefix}weight"] = matrix[:, :width].reshape(weight.shape).to(weight.dtype)
    if bias is not None:
        state[f"{prefix}bias"] = matrix[:, width].to(bias.dtype)


def input_moments(
    module: nn.Module, x: Tensor, names: Sequence[str], *, device: torch.device, batch_size: int = 64
) -> dict[str, Tensor]:
    """Second moments of the inputs of some layers, summed over positions, per example.

    Args:
        module: moved to the device, in evaluation mode.
        x: inputs, shape ``(n, *input_shape)``, at least one.
        names: of layers.
        device: where.
        batch_size: examples at a time.

    Returns:
        Layer's name to shape ``(d_in, d_in)``, float64, on the CPU; a bias counts as an input of 1.
    """
    module.to(device).eval()
    layers = {name: layer for name, layer in module.named_modules() if name in names}
    totals: dict[str, Tensor] = {}
    for batch in x.split(batch_size):
        with torch.no_grad(), _captured(layers) as seen:
            module(batch.to(device))
        for name in names:
            rows = torch.cat([part.flatten(0, -2) for part in seen.inputs[name]])
            totals[name] = totals.get(name, 0.0) + (rows.T @ rows).double().cpu()
    return {name: total / len(x) for name, total in totals.items()}


def curvature(
    module: nn.Module,
    x: Tensor,
    layers: Sequence[str],
    gradients: Gradients,
    *,
    device: torch.device,
    kronecker: bool,
    batch_size: int = 64,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Curvature:
    """Fisher information of all parameters, per example.

    Args:
        module: moved to the device, in evaluation mode.
        x: inputs, shape ``(n, *input_shape)``, at least one.
        layers: names from :func:`dense_layers`.
        gradients: what is squared.
        device: where.
        kronecker: keep two factors for each of the layers (K-FAC; convolutions as in KFC) instead of a diagonal.
        batch_size: examples at a time.
        progress: called with (examples done, examples in all).

    Returns:
        Sums over examples and gradients, divided by the number of examples, float64, on the CPU. The diagonal covers
        every parameter, or those outside of the layers.
    """
    module.to(device).eval().requires_grad_()
    kept = {name: layer for name, layer in module.named_modules() if name in layers}
    inside = {f"{name}.{p}" if name else p for name, layer in kept.items() for p, _ in layer.named_parameters()}
    others = [name for name, _ in module.named_parameters() if name not in inside]
    found = Curvature()
    done = 0
    for index in torch.arange(len(x)).split(batch_size):
        batch = x[index].to(device)
        with _captured(kept, keep_outputs=True) as seen:
            logits = module(batch)
        wanted = gradients(logits.detach(), index)
        outputs = [(name, output) for name in kept for output in seen.outputs[name]]
        for number, direction in enumerate(wanted if outputs else []):
            by_output = torch.autograd.grad(
                logits, [o for _, o in outputs], direction, retain_graph=number + 1 < len(wanted)
            )
            for name, layer in kept.items():
                parts = [g for (n, _), g in zip(outputs, by_output, strict=True) if n == name]
                rows = torch.cat([_rows(g, len(index), _is_conv(layer)) for g in parts], 1)
                entering = torch.cat([part.reshape(len(index), -1, part.shape[-1]) for part in seen.inputs[name]], 1)
                if kronecker:
                    _add(found.gradients, name, rows.flatten(0, 1).T @ rows.flatten(0, 1) / rows.shape[1])
                    if number == 0:
                        _add(found.inputs, name, entering.flatten(0, 1).T @ entering.flatten(0, 1))
                else:
                    _add_diagonal(found.diagonal, name, layer, _squares(rows, entering))
        for name, squares in _other_squares(module, batch, wanted, others).items():
            _add(found.diagonal, name, squares)
        done += len(index)
        progress(done, len(x))
    for table in (found.diagonal, found.inputs, found.gradients):
        for name in table:
            table[name] = table[name] / len(x)
    return found


def input_rows(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer's inputs as rows that its matrix multiplies.

    Args:
        layer: linear or convolutional.
        x: what enters it.

    Returns:
        Shape ``(n, ..., d_in)``; the last column is 1 if the layer has a bias.
    """
    if isinstance(layer, nn.Conv2d):
        # The layer's own padding, whatever its mode, and then plain patches.
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        x = F.unfold(x, layer.kernel_size, layer.dilation, 0, layer.stride).transpose(1, 2)
    return torch.cat([x, x.new_ones(*x.shape[:-1], 1)], -1) if getattr(layer, "bias", None) is not None else x


@dataclass
class _Seen:
    inputs: dict[str, list[Tensor]]
    outputs: dict[str, list[Tensor]]


@contextmanager
def _captured(layers: Mapping[str, nn.Module], *, keep_outputs: bool = False) -> Iterator[_Seen]:
    seen = _Seen({name: [] for name in layers}, {name: [] for name in layers})

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor | None]:
        def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            seen.inputs[name].append(input_rows(layer, inputs[0].detach()))
            if not keep_outputs:
                return None
            seen.outputs[name].append(output)
            # What follows may write into its input; the output that is kept must stay what the layer gave.
            return output.clone()

        return keep

    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _is_conv(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d)


def _rows(gradient: Tensor, n: int, is_conv: bool) -> Tensor:
    """Gradients of a layer's outputs, shape ``(n, positions, d_out)``."""
    if is_conv:
        return gradient.flatten(2).mT
    return gradient.reshape(n, -1, gradient.shape[-1])


def _squares(rows: Tensor, entering: Tensor) -> Tensor:
    """Sum over examples of the squared gradient of the matrix, shape ``(d_out, d_in)``."""
    if rows.shape[1] == 1:
        return rows[:, 0].square().T @ entering[:, 0].square()
    step = max(1, _LARGEST // (rows.shape[-1] * entering.shape[-1]))
    total = rows.new_zeros(rows.shape[-1], entering.shape[-1])
    for g, a in zip(rows.split(step), entering.split(step), strict=True):
        total += (g.transpose(1, 2) @ a).square().sum(0)
    return total


def _other_squares(module: nn.Module, batch: Tensor, wanted: Tensor, names: Sequence[str]) -> dict[str, Tensor]:
    """Squared gradients of the parameters outside of the layers, summed over examples, one example at a time."""
    if not names:
        return {}
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    moving = {name: state[name].detach() for name in names}
    fixed = {name: tensor.detach() for name, tensor in state.items() if name not in moving}

    def value(parameters: dict[str, Tensor], one: Tensor, direction: Tensor) -> Tensor:
        logits = torch.func.functional_call(module, {**fixed, **parameters}, (one[None],))
        pushed: Tensor = logits[0] * direction
        return pushed.sum()

    by_example = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0, 0))
    step = max(1, _LARGEST // max(1, sum(p.numel() for p in moving.values())))
    totals = {name: torch.zeros_like(p) for name, p in moving.items()}
    # The fast kernels of attention have no rule for a batch of examples one by one.
    with sdpa_kernel(SDPBackend.MATH):
        for direction in wanted:
            for x, v in zip(batch.split(step), direction.split(step), strict=True):
                for name, gradient in by_example(moving, x, v).items():
                    totals[name] += gradient.square().sum(0)
    return totals


def _add(table: dict[str, Tensor], name: str, value: Tensor) -> None:
    addend = value.detach().double().cpu()
    table[name] = table[name] + addend if name in table else addend


def _add_diagonal(table: dict[str, Tensor], name: str, layer: nn.Linear | nn.Conv2d, squares: Tensor) -> None:
    pieces: dict[str, Tensor] = {f"{name}.{p}" if name else p: t for p, t in layer.named_parameters()}
    put_matrix(pieces, name, squares)
    for key, piece in pieces.items():
        _add(table, key, piece)
