"""Models of transformers: encoders with a head, sequence classifiers, and causal language models."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.artifact import ModelSpec, Recipe
from fedfuse.core.errors import ConfigError, ModelError
from fedfuse.core.examples import Examples
from fedfuse.core.judging import Evaluation
from fedfuse.core.registry import register_model, register_recipe
from fedfuse.core.seeding import Rng
from fedfuse.core.settings import from_json, to_json
from fedfuse.models.foundation.base import base_of, load_base
from fedfuse.models.foundation.foundation import Foundation, mean_over
from fedfuse.models.foundation.peft_kinds import PeftSettings

Task = Literal["encoder", "sequence_classifier", "causal_lm"]
Pooling = Literal["mean", "first", "last"]

AUTO_CLASSES = {
    "encoder": "AutoModel",
    "sequence_classifier": "AutoModelForSequenceClassification",
    "causal_lm": "AutoModelForCausalLM",
}
"""Class of transformers that loads the base for each task."""
_JUDGED_AT_ONCE = 32


@register_model("transformers")
@dataclass(frozen=True, kw_only=True)
class Transformers:
    """Any model of the transformers library, from a folder, a hub or a configuration, trained whole or in part.

    Inputs are tokens, as the source ``text`` makes them.

    Args:
        path: folder that ``save_pretrained`` wrote, or a name on the hub; left out, weights are drawn.
        config: of transformers, with ``model_type`` where there is no path; beside one, settings that differ, such as
            ``num_hidden_layers: 2`` for the lower two layers.
        task: ``encoder``: hidden states are pooled and a new head classifies; ``sequence_classifier``: the model's own
            classification head, new where the folder has none for that many classes; ``causal_lm``: writes the
            completion of a prompt.
        pooling: of ``encoder``: ``mean`` over the tokens, the ``first`` or the ``last``.
        peft: which part is trained.
        tokenizer: what turns tokens into text when answers are judged; the model's folder if left out.
        num_generated: of ``causal_lm``: test prompts whose answers are written for exact match and ROUGE; 0 is none.
    """

    path: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    task: Task = "encoder"
    pooling: Pooling = "mean"
    peft: PeftSettings = field(default_factory=PeftSettings)
    tokenizer: str | None = None
    num_generated: int = 0

    def spec(self, input_shape: tuple[int, ...], num_classes: int, seed: int) -> ModelSpec:
        """The specification of the model.

        Args:
            input_shape: ``(length,)``, or ``(2 * length,)`` for prompts with completions.
            num_classes: number of classes.
            seed: adapters, a new head and, without a path, all weights are drawn from it.

        Raises:
            ConfigError: a setting cannot be.
            ModelError: the model cannot be built.
        """
        if len(input_shape) != 1 or (self.task == "causal_lm" and input_shape[0] % 2):
            raise ConfigError(
                f"inputs of shape {tuple(input_shape)} are no "
                + ("prompts with completions" if self.task == "causal_lm" else "tokens of texts"),
                where="model.family",
                fix="use source: text"
                + (" with prompt_column and completion_column" if self.task == "causal_lm" else ""),
            )
        recipe = {
            "kind": "transformers",
            "base": base_of(self.path, self.config, seed),
            "task": self.task,
            "pooling": self.pooling,
            "peft": to_json(self.peft),
            "tokenizer": (self.path or "") if self.tokenizer is None else self.tokenizer,
            "num_generated": self.num_generated,
            "num_classes": num_classes,
        }
        spec = ModelSpec(recipe=recipe, seed=seed, input_shape=tuple(input_shape), num_classes=num_classes)
        self._check(recipe, input_shape[0] // (2 if self.task == "causal_lm" else 1))
        return spec

    def build(self, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Build the model.

        Args:
            input_shape: see :meth:`spec`.
            num_classes: number of classes.
        """
        return self.spec(input_shape, num_classes, 0).build()

    def _check(self, recipe: Mapping[str, Any], length: int) -> None:
        net = load_net(recipe)
        self.peft.check_rank(net)
        longest = getattr(net.config, "max_position_embeddings", None) or getattr(net.config, "n_positions", None)
        if longest is not None and length > longest:
            raise ConfigError(
                f"texts of {length} tokens are longer than the model's {longest}",
                where="data.max_length",
                fix=f"set max_length to {longest} or less",
            )


def load_net(recipe: Mapping[str, Any]) -> Any:
    """The base of a model, as it was before anything was trained.

    Args:
        recipe: as :meth:`Transformers.spec` writes it.

    Returns:
        The network of transformers; its weights are shared with other copies.
    """
    task = recipe["task"]
    labels = {"num_labels": recipe["num_classes"]} if task == "sequence_classifier" else {}
    return load_base(recipe["base"], AUTO_CLASSES[task], **labels)


@register_recipe("transformers")
def build_transformers(recipe: Mapping[str, Any]) -> nn.Module:
    """Build a model of transformers; new parts are drawn from torch's generator.

    Args:
        recipe: as :meth:`Transformers.spec` writes it.

    Returns:
        The model.
    """
    settings = from_json(PeftSettings, recipe["peft"], where="model.peft")
    net = load_net(recipe)
    if recipe["task"] == "causal_lm":
        return CausalLM(net, settings, recipe)
    return TextClassifier(net, settings, recipe)


class TextClassifier(Foundation):
    """Tokens to logits.

    Args:
        net: of transformers, without adapters.
        peft: which part of it is trained.
        recipe: rebuilds this module.
    """

    def __init__(self, net: Any, peft: PeftSettings, recipe: Recipe) -> None:
        own_head = _last_linear(net, recipe["num_classes"]) if recipe["task"] == "sequence_classifier" else None
        vocabulary, width = net.get_input_embeddings().num_embeddings, 0 if own_head else _width(net)
        if net.config.pad_token_id is None:
            # Some refuse batches without one. Nothing looks for it: what is padding is told by the mask.
            net.config.pad_token_id = -1
        super().__init__(peft.apply(net, "FEATURE_EXTRACTION"), recipe)
        self.vocabulary, self.pooling = vocabulary, recipe["pooling"]
        self.head = nn.Linear(width, recipe["num_classes"]) if own_head is None else None
        self._own_head = ""
        if own_head is not None:
            own_head.requires_grad_(True)
            self._own_head = next(name for name, module in self.named_modules() if module is own_head)
        self.feature_width = self.classifier.in_features
        self.hide_base()

    @property
    def classifier(self) -> nn.Linear:
        """The last layer, from features to logits."""
        head = self.get_submodule(self._own_head) if self.head is None else self.head
        assert isinstance(head, nn.Linear)
        return head

    def forward(self, x: Tensor) -> Tensor:
        """Classify.

        Args:
            x: tokens, shape ``(n, length)``.

        Returns:
            Logits, shape ``(n, num_classes)``.
        """
        logits: Tensor = self.classifier(self.features(x))
        return logits

    def features(self, x: Tensor) -> Tensor:
        """What the head sees.

        Args:
            x: tokens, shape ``(n, length)``.

        Returns:
            Shape ``(n, feature_width)``.
        """
        ids, mask = self.tokens_of(x, self.vocabulary)
        if self.head is not None:
            # Virtual tokens of prompt tuning come first and are no part of the text.
            hidden = self.net(input_ids=ids, attention_mask=mask).last_hidden_state[:, -ids.shape[1] :]
        else:
            seen: list[Tensor] = []
            hook = self.classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
            try:
                self.net(input_ids=ids, attention_mask=mask)
            finally:
                hook.remove()
            if seen[-1].dim() == 2:
                return seen[-1]
            hidden = seen[-1][:, -ids.shape[1] :]
        rows = torch.arange(len(ids), device=ids.device)
        # A causal model's own head was trained on the last token.
        if self.head is None or self.pooling == "last":
            last: Tensor = hidden[rows, mask.sum(1) - 1]
            return last
        return mean_over(hidden, mask) if self.pooling == "mean" else hidden[:, 0]


class CausalLM(Foundation):
    """Prompts to completions; learns the completions only.

    Inputs hold token ids in their first half and in their second, at the same places, 1 where the token is to be
    learnt.

    Args:
        net: of transformers, without adapters.
        peft: which part of it is trained.
        recipe: rebuilds this module.
    """

    def __init__(self, net: Any, peft: PeftSettings, recipe: Recipe) -> None:
        vocabulary = net.get_input_embeddings().num_embeddings
        head = net.get_output_embeddings()
        super().__init__(peft.apply(net, "CAUSAL_LM"), recipe)
        self.vocabulary = vocabulary
        self.tokenizer: str = recipe["tokenizer"]
        self.num_generated: int = recipe["num_generated"]
        if peft.kind == "head":
            head.requires_grad_(True)
        self.hide_base()

    def forward(self, x: Tensor) -> Tensor:
        """Predict every next token.

        Args:
            x: ids and flags, shape ``(n, 2 * length)``.

        Returns:
            Logits, shape ``(n, longest text of the batch, vocabulary)``.
        """
        return self._logits(x)[0]

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy of the tokens that are to be learnt.

        Args:
            x: ids and flags, shape ``(n, 2 * length)``.
            y: not used.

        Returns:
            Mean over these tokens.
        """
        losses, _ = self._completions(x)
        return losses.mean() if len(losses) else self._logits(x)[0].sum() * 0.0

    def judge(self, examples: Examples, *, device: torch.device | str = "cpu") -> Evaluation:
        """Perplexity, and how many tokens of the completions are the likeliest, given those before them.

        Args:
            examples: at least one.
            device: where.
        """
        sum_loss, num_right, num_tokens = 0.0, 0, 0
        for part in examples.x.split(_JUDGED_AT_ONCE):
            losses, is_right = self._completions(part.to(device))
            sum_loss += float(losses.double().sum())
            num_right += int(is_right.sum())
            num_tokens += len(losses)
        loss = sum_loss / max(num_tokens, 1)
        perplexity = float(torch.tensor(loss, dtype=torch.float64).exp())
        return Evaluation(num_right / max(num_tokens, 1), loss, metrics={"perplexity": perplexity})

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        """Continue each prompt with the likeliest token, again and again.

        Args:
            prompts: token ids, at least one each.
            max_new_tokens: most tokens to add.

        Returns:
            The added tokens of each prompt, up to and without the end token.
        """
        end = self._end()
        device = next(self.parameters()).device
        longest = max(len(prompt) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=device)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, longest - len(prompt) :] = torch.tensor(prompt, device=device)
            mask[row, longest - len(prompt) :] = 1
        with torch.inference_mode():
            found = self.net.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                num_beams=1,
                use_cache=True,
                pad_token_id=0 if end is None else end,
                eos_token_id=end,
            )
        answers = [row[longest:].tolist() for row in found]
        return [answer[: answer.index(end)] if end in answer else answer for answer in answers]

    def _end(self) -> int | None:
        end: int | list[int] | None = self.net.config.eos_token_id
        return end[0] if isinstance(end, list) else end

    def _logits(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        length = x.shape[1] // 2
        ids, mask = self.tokens_of(x[:, :length], self.vocabulary)
        logits = self.net(input_ids=ids, attention_mask=mask).logits[:, -ids.shape[1] :]
        return logits, ids, (x[:, length : length + ids.shape[1]] > 0.5) & mask.bool()

    def _completions(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of every token to learn, and whether it is the likeliest; the first token of all has none before it."""
        logits, ids, is_learnt = self._logits(x)
        chosen = is_learnt[:, 1:]
        guesses, truths = logits[:, :-1][chosen].float(), ids[:, 1:][chosen]
        return F.cross_entropy(guesses, truths, reduction="none"), guesses.argmax(-1) == truths


def with_peft(spec: ModelSpec, **settings: Any) -> ModelSpec:
    """The same base model with another part that is trained.

    Args:
        spec: of a foundation model.
        settings: of :class:`PeftSettings`, which differ.

    Raises:
        ModelError: it is no foundation model.
    """
    if "peft" not in spec.recipe:
        raise ModelError("the model is no foundation model", where="model.family", fix="use family: transformers")
    peft = {**spec.recipe["peft"], **settings}
    return dataclasses.replace(spec, recipe={**spec.recipe, "peft": peft})


def _width(net: Any) -> int:
    config = net.config
    for name in ("hidden_size", "d_model", "n_embd", "dim"):
        if isinstance(getattr(config, name, None), int):
            return int(getattr(config, name))
    raise ModelError(
        "the width of the model's hidden states is not known", where="model.task", fix="use task: sequence_classifier"
    )


def _last_linear(net: nn.Module, num_classes: int) -> nn.Linear:
    found = [m for m in net.modules() if isinstance(m, nn.Linear) and m.out_features == num_classes]
    if not found:
        raise ModelError(
            "the model has no linear layer that ends in the classes", where="model.task", fix="use task: encoder"
        )
    return found[-1]


@register_recipe("foundation_features")
def build_features(recipe: Mapping[str, Any]) -> nn.Module:
    """Build what a foundation model gives to its head.

    Args:
        recipe: ``of``: recipe of the model.

    Returns:
        The features.
    """
    with Rng(0).ambient("fresh weights"):
        return Features(build_transformers(recipe["of"]))


class Features(nn.Module):
    """What a foundation model gives to its head, as a module of its own.

    Args:
        model: the model.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Compute the features.

        Args:
            x: tokens, shape ``(n, length)``.

        Returns:
            Shape ``(n, width)``.
        """
        features: Tensor = self.model.features(x)
        return features
