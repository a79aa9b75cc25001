from __future__ import annotations

import random

import pytest
import torch

from fedfuse.core.examples import Examples
from fedfuse.core.judging import Evaluation
from fedfuse.data.dialogues import dialogue_rows
from fedfuse.data.tokenizers import open_tokenizer
from fedfuse.training import evaluate
from fedfuse.training.text_scores import generation_scores, normalized, rouge_1, rouge_l

BYTES = open_tokenizer("bytes")
END = BYTES.end_id


def _dialogues(pairs: dict[str, str], max_length: int = 40) -> torch.Tensor:
    return torch.from_numpy(dialogue_rows(BYTES, list(pairs), list(pairs.values()), max_length))


def test_scores_that_can_be_counted_by_hand() -> None:
    rows = _dialogues({"capital of France?": "Paris.", "a song?": "the old grey cat"})
    answers = {"capital of France?": " paris", "a song?": "the grey dog"}

    def generate(prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        # The longest completion has 16 bytes and its end.
        assert max_new_tokens == 17
        return [BYTES.encode_one(answers[BYTES.decode(p).strip()]) for p in prompts]

    scores = generation_scores(generate, BYTES, rows, 10)
    # The second shares the, grey with 4 and 3 words: F = 2 * 2 / 7, in order.
    assert scores == pytest.approx({"exact_match": 0.5, "rouge_1": (1 + 4 / 7) / 2, "rouge_l": (1 + 4 / 7) / 2})


def test_what_is_written_after_the_end_does_not_count() -> None:
    rows = _dialogues({"q": "yes"})
    scores = generation_scores(lambda prompts, _: [[*b"yes", END, *b" and no"]] * len(prompts), BYTES, rows, 1)
    assert scores == {"exact_match": 1.0, "rouge_1": 1.0, "rouge_l": 1.0}


def test_prompts_are_spread_over_the_rows_and_handed_over_by_length() -> None:
    rows = _dialogues({f"{'p' * (9 - i)}{i}": "x" for i in range(10)})
    seen: list[str] = []

    def generate(prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        seen.extend(BYTES.decode(prompt).strip() for prompt in prompts)
        return [[] for _ in prompts]

    assert generation_scores(generate, BYTES, rows, 4)["exact_match"] == 0.0
    # Rows 0, 2, 5 and 7, the shortest prompt first.
    assert seen == ["pp7", "pppp5", "ppppppp2", "ppppppppp0"]


def test_rows_without_a_completion_have_no_scores() -> None:
    rows = torch.full((3, 8), -1.0)
    rows[:, 4:] = 0
    assert generation_scores(lambda prompts, _: [], BYTES, rows, 3) == {}


def test_rouge_by_hand() -> None:
    assert rouge_1("police killed the gunman", "police kill the gunman") == pytest.approx(0.75)
    assert rouge_l("the gunman kill police", "police kill the gunman") == pytest.approx(0.5)
    assert rouge_1("the the the", "the cat") == pytest.approx(2 * 1 / 5)
    assert rouge_1("", "a") == rouge_l("a", "...") == 0.0
    assert normalized("No!") == normalized(" no") == "no"
    assert normalized(" :-) ") == ":-)"
    assert normalized("3.5") != normalized("35")


def test_rouge_is_that_of_the_usual_package() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rouge1", "rougeL"])
    draw = random.Random(0)
    for _ in range(200):
        one, other = (" ".join(draw.choices(["a", "B", "c,", "d-e", "5"], k=draw.randrange(9))) for _ in range(2))
        found = scorer.score(one, other)
        assert rouge_1(other, one) == pytest.approx(found["rouge1"].fmeasure)
        assert rouge_l(other, one) == pytest.approx(found["rougeL"].fmeasure)


class _Parrot(torch.nn.Module):
    """Repeats its prompt; knows no end."""

    tokenizer, num_generated = "bytes", 2

    def judge(self, examples: Examples, *, device: torch.device | str = "cpu") -> Evaluation:
        return Evaluation(0.25, 1.0, metrics={"perplexity": 2.5})

    def generate(self, prompts: list[list[int]], max_new_tokens: int) -> list[list[int]]:
        return [prompt[:-1][-max_new_tokens:] for prompt in prompts]


def test_answers_are_written_for_the_report_only() -> None:
    rows = _dialogues({"yes": "yes", "no": "hm"})
    examples = Examples(rows, torch.zeros(2, dtype=torch.int64))
    assert evaluate(_Parrot(), examples).metrics == {"perplexity": 2.5}
    seen = evaluate(_Parrot(), examples, writes_answers=True)
    assert seen.metrics == {"perplexity": 2.5, "exact_match": 0.5, "rouge_1": 0.5, "rouge_l": 0.5}
    silent = _Parrot()
    silent.num_generated = 0
    assert evaluate(silent, examples, writes_answers=True).metrics == {"perplexity": 2.5}
