"""Which part of a foundation model is trained."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from fedfuse.core.errors import ConfigError
from fedfuse.models.foundation.base import library, quiet

Kind = Literal["full", "lora", "rslora", "dora", "ia3", "prompt", "prefix", "bias", "head"]
TaskType = Literal["FEATURE_EXTRACTION", "CAUSAL_LM"]

LORA_KINDS = ("lora", "rslora", "dora")

# What attention calls its projections of queries and values, in the order in which they are looked for.
_TARGETS = (
    ("q_proj", "v_proj"),
    ("query", "value"),
    ("q_lin", "v_lin"),
    ("to_q", "to_k", "to_v", "to_out.0"),
    ("query_key_value",),
    ("c_attn",),
    ("Wqkv",),
    ("qkv_proj",),
    ("q", "v"),
)
_IA3_TARGETS = (
    (("k_proj", "v_proj", "down_proj"), ("down_proj",)),
    (("key", "value", "output.dense"), ("output.dense",)),
    (("k_lin", "v_lin", "ffn.lin2"), ("ffn.lin2",)),
    (("query_key_value", "dense_4h_to_h"), ("dense_4h_to_h",)),
    (("c_attn", "mlp.c_proj"), ("mlp.c_proj",)),
)


@dataclass(frozen=True, kw_only=True)
class PeftSettings:
    """The part of a model that is trained; a new classification head always is.

    Args:
        kind: ``full``: everything. ``lora`` (Hu et al., 2021), ``rslora`` (scale lora_alpha / sqrt(rank)), ``dora``
            (with magnitudes); ``ia3``: learned scales of keys, values and feed-forward activations; ``prompt`` and
            ``prefix``: learned virtual tokens, before the input or in every layer; ``bias``: all biases; ``head``: the
            last layer only.
        rank: of LoRA, at least 1 and below both dimensions of every weight that it changes.
        lora_alpha: numerator of LoRA's scale; twice the rank if left out.
        dropout: on LoRA's input, in [0, 1).
        target_modules: ends of names of linear modules; found by the model's attention if empty; ``all-linear`` alone
            takes all but the head.
        layers: numbers of the layers with adapters; empty takes all.
        num_virtual_tokens: of ``prompt`` and ``prefix``, at least 1.
    """

    kind: Kind = "full"
    rank: int = 8
    lora_alpha: float | None = None
    dropout: float = 0.0
    target_modules: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    num_virtual_tokens: int = 8

    def __post_init__(self) -> None:
        for name in ("rank", "num_virtual_tokens"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}", where=f"model.peft.{name}", fix="give at least 1")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout is {self.dropout:g}", where="model.peft.dropout", fix="give a number in [0, 1)")
        if self.lora_alpha is not None and not 0 < self.lora_alpha < float("inf"):
            raise ConfigError(
                f"lora_alpha is {self.lora_alpha:g}", where="model.peft.lora_alpha", fix="give a number above 0"
            )

    @property
    def alpha(self) -> float:
        """``lora_alpha``, or its default."""
        return 2.0 * self.rank if self.lora_alpha is None else self.lora_alpha

    def apply(self, net: nn.Module, task: TaskType) -> nn.Module:
        """Freeze a network but for the part that is trained, and put that part in where it is new.

        Args:
            net: of transformers or diffusers; changed in place.
            task: what it is for.

        Returns:
            The network, wrapped by PEFT where there is something new in it.

        Raises:
            ConfigError: the network does not have what the kind needs.
        """
        if self.kind == "full":
            return net
        net.requires_grad_(False)
        if self.kind == "head":
            return net
        if self.kind == "bias":
            biases = [p for name, p in net.named_parameters() if name.rpartition(".")[2] == "bias"]
            if not biases:
                raise ConfigError("the model has no biases", where="model.peft.kind", fix="use kind: lora")
            for bias in biases:
                bias.requires_grad_(True)
            return net
        peft = library("peft")
        with warnings.catch_warnings(), quiet():
            warnings.simplefilter("ignore")
            try:
                wrapped: nn.Module = peft.get_peft_model(net, self._config(peft, net, task))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise ConfigError(
                    f"the model cannot be trained by {self.kind}: {reason:.200}",
                    where="model.peft",
                    fix="choose target_modules, or another kind",
                ) from None
        return wrapped

    def _config(self, peft: Any, net: nn.Module, task: TaskType) -> Any:
        if self.kind in LORA_KINDS:
            targets = self.targets(net)
            return peft.LoraConfig(
                r=self.rank,
                lora_alpha=self.alpha,
                lora_dropout=self.dropout,
                target_modules=targets,
                layers_to_transform=list(self.layers) or None,
                use_rslora=self.kind == "rslora",
                use_dora=self.kind == "dora",
                task_type=None if task == "FEATURE_EXTRACTION" else task,
            )
        if self.kind == "ia3":
            scaled, feedforward = self._ia3_targets(net)
            return peft.IA3Config(target_modules=list(scaled), feedforward_modules=list(feedforward))
        maker = peft.PromptTuningConfig if self.kind == "prompt" else peft.PrefixTuningConfig
        return maker(task_type=task, num_virtual_tokens=self.num_virtual_tokens)

    def targets(self, net: nn.Module) -> list[str] | str:
        """The ends of names of the modules that LoRA changes.

        Args:
            net: the network.

        Returns:
            Ends of names, or ``all-linear``.

        Raises:
            ConfigError: no module is called so.
        """
        names = linear_names(net)
        if self.target_modules == ("all-linear",):
            return "all-linear"
        for end in self.target_modules:
            if not any(_ends(name, end) for name in names):
                raise ConfigError(
                    f'no linear module is called "{end}"',
                    where="model.peft.target_modules",
                    fix=f"some that there are: {', '.join(sorted({n.rpartition('.')[2] for n in names})[:8])}",
                )
        if self.target_modules:
            return list(self.target_modules)
        found = next((t for t in _TARGETS if all(any(_ends(name, end) for name in names) for end in t)), None)
        return list(found) if found else "all-linear"

    def check_rank(self, net: nn.Module) -> None:
        """Refuse a rank that is not low for a weight that it is to change.

        Args:
            net: the network, before adapters are put in.

        Raises:
            ConfigError: it is not below both dimensions.
        """
        if self.kind not in LORA_KINDS:
            return
        targets = self.targets(net)
        for name, module in net.named_modules():
            if name not in linear_names(net) or not (targets == "all-linear" or any(_ends(name, t) for t in targets)):
                continue
            shape = tuple(module.weight.shape)
            if self.rank >= min(shape):
                raise ConfigError(
                    f'the rank {self.rank} is not low for "{name}", which is {shape[0]} x {shape[1]}',
                    where="model.peft.rank",
                    fix=f"give a rank below {min(shape)}",
                )

    def _ia3_targets(self, net: nn.Module) -> tuple[Sequence[str], Sequence[str]]:
        names = linear_names(net)
        for targets, feedforward in _IA3_TARGETS:
            if all(any(_ends(name, end) for name in names) for end in targets):
                return targets, feedforward
        if self.target_modules:
            return self.target_modules, ()
        raise ConfigError(
            "it is not known where ia3 scales this model",
            where="model.peft.kind",
            fix="give target_modules: the projections of keys and values",
        )


def linear_names(net: nn.Module) -> list[str]:
    """Names of the modules that LoRA can change.

    Args:
        net: a network.
    """
    kinds = ("Linear", "Conv1D")
    return [name for name, module in net.named_modules() if type(module).__name__ in kinds]


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith("." + end)
