"""Prompts and completions as rows of numbers: tokens, and which of them a model learns to write."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError
from fedfuse.data.tokenizers import PADDING, Tokens


def dialogue_rows(
    tokens: Tokens,
    prompts: Sequence[str] | None,
    completions: Sequence[str],
    max_length: int,
    *,
    is_chat: bool = True,
) -> np.ndarray:
    """Write dialogues as rows: the tokens of prompt and completion, then a flag for each.

    The flag is 1 where the token is to be learnt: the completion and the token that ends it. Where both do not fit, the
    prompt is cut from its left, behind what stands before every text; a completion that fills the row by itself is cut
    from its right, and then has no end.

    Args:
        tokens: makes the tokens.
        prompts: what is asked; ``None`` where there are completions only, all of which are learnt.
        completions: what is answered, as many.
        max_length: tokens of a dialogue, at least 2.
        is_chat: write prompts by the tokenizer's own template where it has one.

    Returns:
        float32, shape ``(len(completions), 2 * max_length)``; -1 after the last token, with flag 0.

    Raises:
        ConfigError: a row has no room.
    """
    own = tokens.prefix
    num_kept = max(1, len(own))
    if max_length < num_kept + 1:
        raise ConfigError(
            f"max_length is {max_length}, and a dialogue has no room", where="data.max_length", fix="give a few tokens"
        )
    rows = np.zeros((len(completions), 2 * max_length), dtype=np.float32)
    rows[:, :max_length] = PADDING
    for index, completion in enumerate(completions):
        asked = list(own) if prompts is None else tokens.prompt_ids(prompts[index], is_chat=is_chat)
        answer = [*tokens.encode_one(completion), tokens.end_id][: max_length - (num_kept if asked else 0)]
        room = max_length - len(answer)
        if len(asked) > room:
            asked = own + asked[len(asked) - room + len(own) :] if asked[: len(own)] == own else asked[-room:]
        end = len(asked) + len(answer)
        rows[index, :end] = asked + answer
        rows[index, max_length + len(asked) : max_length + end] = 1
    return rows


def dialogue_parts(row: Tensor) -> tuple[list[int], list[int]]:
    """Read a row again.

    Args:
        row: as :func:`dialogue_rows` writes it, shape ``(2 * max_length,)``.

    Returns:
        The tokens of the prompt and those of the completion, padding left out.
    """
    ids, flags = row.view(2, -1).tolist()
    asked = [int(i) for i, flag in zip(ids, flags, strict=True) if i >= 0 and flag == 0]
    return asked, [int(i) for i, flag in zip(ids, flags, strict=True) if i >= 0 and flag == 1]


def dialogue_batch(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Tensor:
    """Write tokens that are known already as rows, as wide as the longest needs.

    Args:
        pairs: the tokens of each prompt, and those that are learnt or scored.

    Returns:
        float32, shape ``(len(pairs), 2 * longest)``, as :func:`dialogue_rows` writes them.

    Example:
        >>> dialogue_batch([([7], [8]), ([5], [])]).tolist()
        [[7.0, 8.0, 0.0, 1.0], [5.0, -1.0, 0.0, 0.0]]
    """
    width = max(len(asked) + len(answer) for asked, answer in pairs)
    rows = torch.zeros(len(pairs), 2, width)
    rows[:, 0] = PADDING
    for row, (asked, answer) in zip(rows, pairs, strict=True):
        end = len(asked) + len(answer)
        row[0, :end] = torch.tensor([*asked, *answer], dtype=torch.float32)
        row[1, len(asked) : end] = 1
    return rows.flatten(1)
