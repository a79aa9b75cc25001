"""How good written answers are: exact match and ROUGE."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fedfuse.data.dialogues import dialogue_parts
from fedfuse.data.tokenizers import Tokens

_WORD = re.compile(r"[^\W_]+")
_AT_ONCE = 32

Generate = Callable[[list[list[int]], int], list[list[int]]]
"""Prompts as token ids and the most tokens to add, to the added tokens of each prompt."""


def generation_scores(generate: Generate, tokens: Tokens, dialogues: Tensor, num_examples: int) -> dict[str, float]:
    """Let a model answer some prompts, and compare its answers with the completions.

    The prompts are spread evenly over the rows, so that rows sorted by task all have a say. An answer may be as long as
    the longest completion among them.

    Args:
        generate: continues prompts; the same prompts must give the same answers.
        tokens: turns tokens into text.
        dialogues: as :func:`fedfuse.data.dialogues.dialogue_rows` writes them, shape ``(n, 2 * max_length)``.
        num_examples: how many prompts, at most ``n``.

    Returns:
        ``exact_match``, ``rouge_1`` and ``rouge_l``, means in [0, 1]; nothing where no row has a completion.
    """
    pairs = [dialogue_parts(row) for row in dialogues[_spread(len(dialogues), num_examples)]]
    pairs = [(asked, answer) for asked, answer in pairs if asked and answer]
    if not pairs:
        return {}
    longest = max(len(answer) for _, answer in pairs)
    # Prompts of like length share a batch: less padding, and answers do not depend on it.
    order = sorted(range(len(pairs)), key=lambda index: (len(pairs[index][0]), index))
    sums = dict.fromkeys(("exact_match", "rouge_1", "rouge_l"), 0.0)
    for start in range(0, len(order), _AT_ONCE):
        batch = [pairs[index] for index in order[start : start + _AT_ONCE]]
        written = generate([asked for asked, _ in batch], longest)
        for (_, answer), ids in zip(batch, written, strict=True):
            found, wanted = tokens.decode(_until(ids, tokens.end_id)), tokens.decode(_until(answer, tokens.end_id))
            sums["exact_match"] += float(normalized(found) == normalized(wanted))
            sums["rouge_1"] += rouge_1(found, wanted)
            sums["rouge_l"] += rouge_l(found, wanted)
    return {name: value / len(pairs) for name, value in sums.items()}


def normalized(text: str) -> str:
    """A text as exact match compares it: words in lower case, without marks between them.

    Args:
        text: any.

    Returns:
        Words with one space between them; a text without any word stays as it is, without spaces around it.

    Example:
        >>> normalized(" Science  and Technology. ") == normalized("science and technology")
        True
    """
    return " ".join(words(text)) or text.strip()


def words(text: str) -> list[str]:
    """Letters and digits that stand together, in lower case.

    Args:
        text: any.

    Example:
        >>> words("It's 5 o'clock!")
        ['it', 's', '5', 'o', 'clock']
    """
    return _WORD.findall(text.lower())


def rouge_1(written: str, wanted: str) -> float:
    """ROUGE-1 (Lin, 2004): words in common, as an F score.

    Args:
        written: by the model.
        wanted: the reference.

    Returns:
        In [0, 1]; 0 where either has no words.

    Example:
        >>> round(rouge_1("the cat sat", "the cat sat down today"), 3)
        0.75
    """
    own, other = words(written), words(wanted)
    return _f_score((Counter(own) & Counter(other)).total(), len(own), len(other))


def rouge_l(written: str, wanted: str) -> float:
    """ROUGE-L (Lin, 2004): the longest common subsequence of words, as an F score.

    Args:
        written: by the model.
        wanted: the reference.

    Returns:
        In [0, 1]; 0 where either has no words.

    Example:
        >>> round(rouge_l("sat the cat", "the cat sat"), 3)
        0.667
    """
    own, other = words(written), words(wanted)
    return _f_score(_common_length(own, other), len(own), len(other))


def _f_score(num_common: int, num_written: int, num_wanted: int) -> float:
    """Harmonic mean of the common part of both."""
    return 2 * num_common / (num_written + num_wanted) if num_common else 0.0


def _common_length(own: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence, row by row of the usual table."""
    lengths = [0] * (len(other) + 1)
    for word in own:
        diagonal = 0
        for column, wanted in enumerate(other, start=1):
            above = lengths[column]
            lengths[column] = diagonal + 1 if word == wanted else max(above, lengths[column - 1])
            diagonal = above
    return lengths[-1]


def _spread(num_rows: int, num_wanted: int) -> Tensor:
    """Positions of some rows, evenly spread."""
    num_wanted = min(num_wanted, num_rows)
    return torch.arange(num_wanted) * num_rows // max(1, num_wanted)


def _until(ids: Sequence[int], end_id: int) -> list[int]:
    kept = list(ids)
    return kept[: kept.index(end_id)] if end_id in kept else kept
