"""Language models under the tasks of the lm-eval harness, where it is installed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.core.errors import ConfigError, ModelError
from fedfuse.core.judging import Generates
from fedfuse.data.checks import optional_module
from fedfuse.data.dialogues import dialogue_batch
from fedfuse.data.tokenizers import Tokens

_NEW_TOKENS = 256
_Pair = tuple[list[int], list[int]]


@dataclass(frozen=True)
class TextScorer:
    """What a language model thinks of texts, and what it writes: all that the harness asks.

    Args:
        module: maps prompts with completions, shape ``(n, 2 * length)``, to logits of every next token, and generates.
        tokens: turns text into its tokens.
        max_length: most tokens that it sees at once, at least 2.
        batch_size: texts at a time.

    Raises:
        ModelError: the module writes no text.
    """

    module: nn.Module
    tokens: Tokens
    max_length: int
    batch_size: int = 16

    def __post_init__(self) -> None:
        if not isinstance(self.module, Generates):
            raise ModelError(
                "the model writes no text, so it has no tasks to do",
                where="--lm-eval",
                fix="evaluate an artifact of a causal language model (task: causal_lm)",
            )

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """How likely each continuation is after its context.

        Spaces at the end of a context belong to the continuation. What is too long is cut on its left.

        Args:
            pairs: context, which may be empty, and continuation.

        Returns:
            For each its natural log-likelihood, and whether it is what the model would write.
        """
        found = []
        for context, continuation in pairs:
            kept = context.rstrip()
            own = self._start(self.tokens.encode_one(kept))
            whole = self._start(self.tokens.encode_one(context + continuation))
            num_context = min(len(own), max(1, len(whole) - 1))
            found.append((whole[:num_context], whole[num_context:]))
        return self._scores([_fitting(asked, answer, self.max_length) for asked, answer in found])

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """How likely each text is, from its first token on; a long one is read in windows.

        Args:
            texts: any length.

        Returns:
            Natural log-likelihoods; every token counts once, with as many tokens before it as fit.
        """
        sums = []
        for text in texts:
            ids = self._start(self.tokens.encode_one(text))
            first = len(self._start([]))
            windows = []
            for start in range(first, len(ids), self.max_length - 1):
                end = min(start + self.max_length - 1, len(ids))
                windows.append((ids[max(0, end - self.max_length) : start], ids[start:end]))
            sums.append(sum(value for value, _ in self._scores(windows)))
        return sums

    def answers(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """What the model writes after each context, the likeliest token at a time.

        Args:
            requests: context, and settings of the harness: ``until``, texts at which the answer ends, and
                ``max_gen_toks``, the most tokens to write.

        Returns:
            The answers, without the text that ended them.

        Raises:
            ConfigError: a task wants answers drawn at random.
        """
        by_length: dict[int, list[int]] = {}
        for index, (_, settings) in enumerate(requests):
            if settings.get("do_sample") or float(settings.get("temperature") or 0) > 0:
                raise ConfigError(
                    "the task draws answers at random",
                    where="--lm-eval",
                    fix="choose a task with do_sample: false: answers must be the same again",
                )
            most = min(int(settings.get("max_gen_toks", _NEW_TOKENS)), self.max_length - 1)
            by_length.setdefault(most, []).append(index)
        written: dict[int, str] = {}
        for most, places in by_length.items():
            for start in range(0, len(places), self.batch_size):
                batch = places[start : start + self.batch_size]
                prompts = [self._start(self.tokens.encode_one(requests[i][0]))[most - self.max_length :] for i in batch]
                assert isinstance(self.module, Generates)
                for index, ids in zip(batch, self.module.generate(prompts, most), strict=True):
                    written[index] = self._text(ids, requests[index][1].get("until") or [])
        return [written[index] for index in range(len(requests))]

    def _text(self, ids: list[int], until: str | Sequence[str]) -> str:
        """An answer up to its end token, and to the first of the texts that end it."""
        end = self.tokens.end_id
        text = self.tokens.decode(ids[: ids.index(end)] if end in ids else ids)
        for stop in [until] if isinstance(until, str) else until:
            text = text.partition(stop)[0] if stop else text
        return text

    def _start(self, ids: list[int]) -> list[int]:
        return (self.tokens.prefix or [self.tokens.end_id]) + ids

    def _scores(self, pairs: Sequence[_Pair]) -> list[tuple[float, bool]]:
        device = next(self.module.parameters()).device
        order = sorted(range(len(pairs)), key=lambda index: (len(pairs[index][0]) + len(pairs[index][1]), index))
        found: dict[int, tuple[float, bool]] = {}
        self.module.eval()
        for start in range(0, len(order), self.batch_size):
            places = order[start : start + self.batch_size]
            with torch.inference_mode():
                logits = self.module(dialogue_batch([pairs[index] for index in places]).to(device))
            for index, row in zip(places, logits, strict=True):
                found[index] = _score(row.float().cpu(), *pairs[index])
        return [found[index] for index in range(len(pairs))]


def run_tasks(
    scorer: TextScorer,
    tasks: Sequence[str],
    *,
    limit: int | None = None,
    num_fewshot: int | None = None,
    task_folder: Path | None = None,
) -> dict[str, dict[str, float]]:
    """Let a model do tasks of the lm-eval harness.

    Args:
        scorer: the model.
        tasks: names of tasks or groups of them.
        limit: first examples of each task only.
        num_fewshot: solved examples before each question; what the task says if left out.
        task_folder: folder of further tasks, as YAML files.

    Returns:
        Task to scores by name.

    Raises:
        ConfigError: the harness cannot do a task.
        DataError: the harness is not installed.
    """
    evaluator = optional_module("lm_eval.evaluator", package="lm-eval", extra="lm-eval")
    manager = optional_module("lm_eval.tasks", package="lm-eval", extra="lm-eval").TaskManager(
        include_path=None if task_folder is None else str(task_folder)
    )
    try:
        seen = evaluator.simple_evaluate(
            model=harness_model(scorer),
            tasks=list(tasks),
            limit=limit,
            num_fewshot=num_fewshot,
            task_manager=manager,
            log_samples=False,
            bootstrap_iters=0,
        )
    except (KeyError, ValueError, TypeError, OSError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ConfigError(
            f"lm-eval cannot do these tasks: {reason:.200}",
            where=f"--lm-eval {','.join(tasks)}",
            fix="lm-eval ls tasks prints their names; most need a network for their data",
        ) from None
    return {str(task): plain_scores(scores) for task, scores in sorted(seen["results"].items())}


def plain_scores(scores: Mapping[str, Any]) -> dict[str, float]:
    """The numbers that the harness gives for a task, without the names of its filters and its spreads.

    Args:
        scores: as the harness gives them.

    Returns:
        Name to number.

    Example:
        >>> plain_scores({"alias": "arc", "acc,none": 0.25, "acc_stderr,none": "N/A", "f1,strict": 0.5})
        {'acc': 0.25, 'f1, strict': 0.5}
    """
    plain = {}
    for key, value in scores.items():
        name, _, kind = str(key).partition(",")
        if "," in str(key) and isinstance(value, (int, float)) and not name.endswith("_stderr"):
            plain[name if kind == "none" else f"{name}, {kind}"] = float(value)
    return plain


def harness_model(scorer: TextScorer) -> Any:
    """A model as the harness knows it.

    Args:
        scorer: what it is asked through.

    Returns:
        An ``lm_eval.api.model.LM``.

    Raises:
        DataError: the harness is not installed.
    """
    api = optional_module("lm_eval.api.model", package="lm-eval", extra="lm-eval")

    class FusedLM(api.LM):  # type: ignore[misc, name-defined] # its base is known when the harness is there
        """Hands what the harness asks to the scorer."""

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            return scorer.log_likelihoods([request.args for request in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            return scorer.rolling([request.args[0] for request in requests])

        def generate_until(self, requests: list[Any]) -> list[str]:
            return scorer.answers([request.args for request in requests])

    return FusedLM()


def _fitting(asked: list[int], answer: list[int], max_length: int) -> _Pair:
    """The last tokens of both, of which at least one stays before what is scored."""
    whole = (asked + answer)[-max_length:]
    num_asked = len(whole) - min(len(answer), len(whole) - 1)
    return whole[:num_asked], whole[num_asked:]


def _score(logits: Tensor, asked: list[int], answer: list[int]) -> tuple[float, bool]:
    """Log-likelihood of an answer, and whether each of its tokens is the likeliest.

    Args:
        logits: shape ``(length, vocabulary)``.
        asked: tokens before the answer, at least one.
        answer: tokens that are scored.
    """
    own = logits[len(asked) - 1 : len(asked) + len(answer) - 1].double().log_softmax(-1)
    wanted = torch.tensor(answer)
    value = own.gather(1, wanted[:, None]).sum()
    return float(value), bool((own.argmax(-1) == wanted).all())
