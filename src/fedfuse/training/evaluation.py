"""How good a model is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.examples import Examples
from fedfuse.core.judging import Draws, Generates, JudgesItself
from fedfuse.core.judging import Evaluation as Evaluation
from fedfuse.data.tokenizers import open_tokenizer
from fedfuse.training.image_scores import with_drawings
from fedfuse.training.text_scores import generation_scores


def predict(
    module: nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 500,
) -> Tensor:
    """Run a module over many inputs in evaluation mode.

    Args:
        module: maps ``(n, *input_shape)`` to ``(n, ...)``.
        x: inputs, shape ``(num_examples, *input_shape)``.
        device: where.
        batch_size: inputs at a time.

    Returns:
        Outputs on the CPU, shape ``(num_examples, ...)``.
    """
    # Pooling and convolutions of images are twice as fast channels-last; it is the weights that decide.
    layout = torch.channels_last if x.ndim == 4 else torch.contiguous_format
    if isinstance(module, nn.Module):
        module = module.to(device).eval()
        if layout is torch.channels_last:
            module.to(memory_format=layout)  # type: ignore[call-overload]
    with torch.inference_mode():
        parts = [module(part.to(device).contiguous(memory_format=layout)).float().cpu() for part in x.split(batch_size)]
        joined = torch.cat(parts) if parts else torch.empty(0)
    # Outside, so that what is predicted can be trained on.
    return joined.clone()


def evaluate(
    module: nn.Module, examples: Examples, *, device: torch.device | str = "cpu", writes_answers: bool = False
) -> Evaluation:
    """How good a model is.

    Args:
        module: maps inputs to logits; or one that judges itself.
        examples: at least one.
        device: where.
        writes_answers: also let a language model write answers, or a text-to-image model draw, as many as it asks
            for; this takes long.

    Returns:
        Accuracy, loss and confusion matrix of a classifier; of others what they say of themselves.
    """
    if not isinstance(module, JudgesItself):
        return score(predict(module, examples.x, device=device), examples.y)
    module.to(device).eval()
    with torch.inference_mode():
        seen = module.judge(examples, device=device)
        if writes_answers and isinstance(module, Draws):
            return with_drawings(module, seen, examples, device=device)
        if not (writes_answers and isinstance(module, Generates) and module.num_generated and module.tokenizer):
            return seen
        tokens = open_tokenizer(module.tokenizer)
        answers = generation_scores(module.generate, tokens, examples.x, module.num_generated)
    return replace(seen, metrics={**seen.metrics, **answers})


def score(logits: Tensor, labels: Tensor) -> Evaluation:
    """Accuracy, loss and confusion matrix of given logits.

    Args:
        logits: shape ``(n, num_classes)``.
        labels: shape ``(n,)``.

    Returns:
        The scores.

    Example:
        >>> seen = score(torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 1]))
        >>> seen.accuracy, seen.confusion.tolist()
        (0.5, [[1, 0], [1, 0]])
    """
    num_classes = logits.shape[1]
    guess = logits.argmax(1)
    confusion = torch.bincount(labels * num_classes + guess, minlength=num_classes**2)
    return Evaluation(
        accuracy=(guess == labels).double().mean().item(),
        loss=F.cross_entropy(logits, labels).item(),
        confusion=confusion.reshape(num_classes, num_classes),
    )
