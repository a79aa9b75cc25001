"""A large pre-trained model of which a part is trained, and nothing but that part is stored or sent."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from fedfuse.core.artifact import ModelSpec, Recipe
from fedfuse.core.errors import DataError, ModelError
from fedfuse.ops.lora import Factors


class Foundation(nn.Module):
    """A network of transformers or diffusers, perhaps with adapters of PEFT in it.

    Its state dict holds what is trained when it is made: parameters that need no gradient then belong to the base,
    which everyone has, and are left out. So whatever is averaged, uploaded, journaled or shipped is as small as the
    adapter. When a state is loaded, the base stays.

    Args:
        net: the network; parameters that need no gradient may share their memory with other copies.
        recipe: rebuilds this module.
    """

    net: Any

    def __init__(self, net: nn.Module, recipe: Recipe) -> None:
        super().__init__()
        self.net = net
        self.recipe = recipe
        self._hidden: frozenset[str] = frozenset()

    def hide_base(self) -> None:
        """Leave what needs no gradient now out of the state, for good, and give the rest memory of its own."""
        parameters = list(self.named_parameters(remove_duplicate=False))
        self._hidden = frozenset(name for name, parameter in parameters if not parameter.requires_grad)
        if len(self._hidden) == len(parameters):
            raise ModelError("nothing of the model is trained", where="model.peft", fix="choose another kind")
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.clone()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """What is trained, and buffers.

        Args:
            args: as of ``torch.nn.Module``.
            kwargs: as of ``torch.nn.Module``.
        """
        prefix = kwargs.get("prefix", args[1] if len(args) > 1 else "")
        state = super().state_dict(*args, **kwargs)
        for name in self._hidden:
            state.pop(prefix + name, None)
        return state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        # The module's own loader then finds the base where it looks for it.
        for name in self._hidden:
            state_dict[prefix + name] = self.get_parameter(name).detach()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def add_to_base(self, changes: Mapping[str, Factors]) -> None:
        """Add low-rank changes to weights of this copy; the base that others share stays as it is.

        Args:
            changes: name of a linear module in this one to the change of its weight.

        Raises:
            ModelError: there is no such weight, or its shape differs.
        """
        for name, change in changes.items():
            weight = self.weight_of(name)
            whole = change.product()
            if self.is_transposed(name):
                whole = whole.T
            if weight.shape != whole.shape:
                raise ModelError(
                    f"a change of shape {tuple(whole.shape)} does not fit a weight of shape {tuple(weight.shape)}",
                    where=name,
                    fix="use changes of the same base model",
                )
            weight.data = (weight.data.double() + whole.to(weight.device)).to(weight.dtype)

    def is_transposed(self, name: str) -> bool:
        """Whether the base's weight of a linear module is stored as ``(d_in, d_out)``, as GPT-2 keeps its own.

        Args:
            name: of the module in this one.
        """
        module = self.get_submodule(name)
        return type(getattr(module, "base_layer", module)).__name__ == "Conv1D"

    def weight_of(self, name: str) -> nn.Parameter:
        """The base's weight of a linear module, also where an adapter lies around it.

        Args:
            name: of the module in this one.

        Raises:
            ModelError: there is none.
        """
        try:
            module = self.get_submodule(name)
            inner = getattr(module, "base_layer", module)
            weight = inner.weight
        except AttributeError:
            weight = None
        if not isinstance(weight, nn.Parameter):
            raise ModelError("the model has no such weight", where=name, fix="use changes of the same base model")
        return weight

    def tokens_of(self, x: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
        """Token ids and which of them are there.

        Args:
            x: whole numbers as floats, shape ``(n, length)``; below 0 is padding.
            vocabulary: number of tokens that the model knows.

        Returns:
            Ids and mask, both int64, cut to the longest text of the batch; padding has id 0.

        Raises:
            DataError: a token is not in the vocabulary.
        """
        ids = x.round().long()
        mask = ids >= 0
        width = max(1, int(mask.any(0).nonzero().max()) + 1 if bool(mask.any()) else 1)
        ids, mask = ids[:, :width].clamp(min=0), mask[:, :width].clone()
        # A text without tokens would have nothing to attend to.
        mask[:, 0] |= ~mask.any(1)
        if int(ids.max()) >= vocabulary:
            raise DataError(
                f"token {int(ids.max())} is beyond the model's vocabulary of {vocabulary}",
                where="data.tokenizer",
                fix="use the tokenizer that belongs to the model",
            )
        return ids, mask.long()


def is_foundation(spec: ModelSpec) -> bool:
    """Whether a model is built on a pre-trained base.

    Args:
        spec: the model.
    """
    return "base" in spec.recipe


def mean_over(values: Tensor, mask: Tensor) -> Tensor:
    """Mean over the tokens that are there.

    Args:
        values: shape ``(n, length, d)``.
        mask: shape ``(n, length)``, 1 where there is a token.

    Returns:
        Shape ``(n, d)``.

    Example:
        >>> import torch
        >>> mean_over(torch.tensor([[[2.0], [4.0]]]), torch.tensor([[1, 0]])).item()
        2.0
    """
    weights = mask.to(values.dtype)[..., None]
    return (values * weights).sum(1) / weights.sum(1).clamp(min=1)
