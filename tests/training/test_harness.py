from __future__ import annotations

import sys
from math import log
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedfuse.core.errors import ConfigError, DataError, ModelError
from fedfuse.data.tokenizers import open_tokenizer
from fedfuse.training.harness import TextScorer, harness_model, run_tasks

BYTES = open_tokenizer("bytes")
BEGIN, END = 256, 257


class Bigrams(nn.Module):
    """After a token of `follows` another with probability 3/4, and each of the 257 others with 1/1028."""

    tokenizer, num_generated = "bytes", 0

    def __init__(self, follows: dict[int, int]) -> None:
        super().__init__()
        chances = torch.full((258, 258), 0.25 / 257)
        for token, then in follows.items():
            chances[token, then] = 0.75
        self.logits = nn.Parameter(chances.log(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        ids = x[:, : x.shape[1] // 2].long().clamp(min=0)
        return self.logits[ids]

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        answers = []
        for prompt in prompts:
            ids = list(prompt)
            for _ in range(max_new_tokens):
                ids.append(int(self.logits[ids[-1]].argmax()))
            answers.append(ids[len(prompt) :])
        return answers


LIKELY, RARE = log(0.75), log(0.25 / 257)
ABC = {BEGIN: ord("a"), ord("a"): ord("b"), ord("b"): ord("c"), ord("c"): END, ord(" "): ord("a"), END: END}


def _scorer(max_length: int = 16) -> TextScorer:
    return TextScorer(Bigrams(ABC), BYTES, max_length, batch_size=2)


def test_continuations_are_scored_by_hand() -> None:
    found = _scorer().log_likelihoods([("a", "bc"), ("a", "bb"), ("", "ab"), ("x ", "a")])
    values, greedy = zip(*found, strict=True)
    # The space of the last context belongs to its continuation: after x all 258 are alike, after the space a is likely.
    assert values == pytest.approx([2 * LIKELY, LIKELY + RARE, 2 * LIKELY, LIKELY - log(258)], abs=1e-5)
    assert greedy == (True, False, True, False)


def test_what_is_too_long_is_cut_on_its_left() -> None:
    ((value, greedy),) = _scorer(3).log_likelihoods([("zzzz", "xabc")])
    # Of a, b, c the last two are scored.
    assert value == pytest.approx(2 * LIKELY, abs=1e-5)
    assert greedy
    assert _scorer(3).log_likelihoods([("zzza", "b")])[0][0] == pytest.approx(LIKELY, abs=1e-5)


@pytest.mark.parametrize("max_length", [2, 3, 4, 5, 6, 7, 16])
def test_every_token_of_a_text_counts_once(max_length: int) -> None:
    # Begin a, a b, b c are likely, c a is not; then a b, b c.
    (value,) = _scorer(max_length).rolling(["abcabc"])
    assert value == pytest.approx(5 * LIKELY + RARE, abs=1e-4)


def test_windows_have_as_many_tokens_before_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    scorer, seen = _scorer(4), []
    monkeypatch.setattr(TextScorer, "_scores", lambda _, pairs: seen.extend(pairs) or [(0.0, True)] * len(pairs))
    scorer.rolling(["abcdefgh"])
    texts = [(bytes(i % 256 for i in asked), bytes(answer)) for asked, answer in seen]
    # Begin is written as a zero byte here.
    assert texts == [(b"\0", b"abc"), (b"c", b"def"), (b"ef", b"gh")]


def test_answers_end_where_the_task_says_or_the_model_does() -> None:
    scorer = _scorer()
    assert scorer.answers([("a", {}), ("a", {"until": "c"}), ("a", {"until": ["z", "b"]})]) == ["bc", "b", ""]
    assert scorer.answers([("a", {"max_gen_toks": 1, "do_sample": False, "temperature": 0.0})]) == ["b"]
    with pytest.raises(ConfigError) as error:
        scorer.answers([("a", {"do_sample": True})])
    assert str(error.value) == (
        "the task draws answers at random\n  where: --lm-eval\n"
        "  fix:   choose a task with do_sample: false: answers must be the same again"
    )


def test_a_model_that_writes_no_text_has_no_tasks() -> None:
    with pytest.raises(ModelError) as error:
        TextScorer(nn.Linear(2, 2), BYTES, 16)
    assert str(error.value) == (
        "the model writes no text, so it has no tasks to do\n  where: --lm-eval\n"
        "  fix:   evaluate an artifact of a causal language model (task: causal_lm)"
    )


def test_without_the_harness_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.evaluator", None)
    with pytest.raises(DataError) as error:
        run_tasks(_scorer(), ["piqa"])
    assert str(error.value) == 'lm-eval is not installed\n  fix:   pip install "fedfuse[lm-eval]"'


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A harness with one task, which asks all three kinds of questions."""
    seen: dict[str, Any] = {}

    class LM:
        pass

    class TaskManager:
        def __init__(self, include_path: str | None) -> None:
            seen["include_path"] = include_path

    def simple_evaluate(model: Any, tasks: list[str], **settings: Any) -> dict[str, Any]:
        assert isinstance(model, LM)
        if tasks != ["abc"]:
            raise KeyError("no such task")
        seen.update(settings)
        likelihood = model.loglikelihood([SimpleNamespace(args=("a", "b"))])[0][0]
        rolling = model.loglikelihood_rolling([SimpleNamespace(args=("ab",))])[0]
        written = model.generate_until([SimpleNamespace(args=("a", {"until": []}))])[0]
        scores = {"ll,none": likelihood, "all,none": rolling, "exact,strict": float(written == "bc"), "alias": "abc"}
        return {"results": {"abc": {**scores, "ll_stderr,none": 0.5}}}

    parts = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.model": {"LM": LM},
        "lm_eval.evaluator": {"simple_evaluate": simple_evaluate},
        "lm_eval.tasks": {"TaskManager": TaskManager},
    }
    for name, content in parts.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return seen


def test_the_harness_asks_the_scorer(stand_in: dict[str, Any]) -> None:
    found = run_tasks(_scorer(), ["abc"], limit=3, num_fewshot=2)
    assert list(found) == ["abc"]
    assert found["abc"] == pytest.approx({"ll": LIKELY, "all": 2 * LIKELY, "exact, strict": 1.0}, abs=1e-5)
    assert {name: stand_in[name] for name in ("limit", "num_fewshot", "include_path", "bootstrap_iters")} == {
        "limit": 3,
        "num_fewshot": 2,
        "include_path": None,
        "bootstrap_iters": 0,
    }
    with pytest.raises(ConfigError) as error:
        run_tasks(_scorer(), ["abd", "abc"])
    assert error.value.what == "lm-eval cannot do these tasks: 'no such task'"
    assert error.value.where == "--lm-eval abd,abc"


def test_the_real_harness_accepts_the_model() -> None:
    api = pytest.importorskip("lm_eval.api.model")
    assert isinstance(harness_model(_scorer()), api.LM)
