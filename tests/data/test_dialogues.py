from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.core.errors import ConfigError
from fedfuse.data.dialogues import dialogue_parts, dialogue_rows
from fedfuse.data.tokenizers import open_tokenizer

BYTES = open_tokenizer("bytes")


def test_only_the_completion_and_its_end_are_learnt() -> None:
    rows = dialogue_rows(BYTES, ["a"], ["bc"], 8)
    # Begin, a, line break, b, c, end, padding; flags at the same places.
    assert rows.tolist() == [[256, 97, 10, 98, 99, 257, -1, -1, 0, 0, 0, 1, 1, 1, 0, 0]]
    assert dialogue_parts(torch.from_numpy(rows[0])) == ([256, 97, 10], [98, 99, 257])


def test_a_long_prompt_is_cut_from_its_left_behind_the_begin() -> None:
    rows = dialogue_rows(BYTES, ["abcdef"], ["xy"], 7)
    assert rows[0, :7].tolist() == [256, 101, 102, 10, 120, 121, 257]
    assert rows[0, 7:].tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_a_completion_that_fills_the_row_is_cut_from_its_right() -> None:
    rows = dialogue_rows(BYTES, ["a"], ["uvwxyz"], 4)
    assert rows.tolist() == [[256, 117, 118, 119, 0, 1, 1, 1]]


def test_without_prompts_everything_behind_the_begin_is_learnt() -> None:
    assert dialogue_rows(BYTES, None, ["ab"], 5).tolist() == [[256, 97, 98, 257, -1, 0, 1, 1, 1, 0]]


def test_a_row_without_room_is_refused() -> None:
    with pytest.raises(ConfigError) as error:
        dialogue_rows(BYTES, ["a"], ["b"], 1)
    assert str(error.value) == (
        "max_length is 1, and a dialogue has no room\n  where: data.max_length\n  fix:   give a few tokens"
    )


@given(prompt=st.text(max_size=20), completion=st.text(max_size=20), max_length=st.integers(2, 40))
def test_a_row_holds_the_end_of_the_prompt_and_the_start_of_the_completion(
    prompt: str, completion: str, max_length: int
) -> None:
    row = torch.from_numpy(dialogue_rows(BYTES, [prompt], [completion], max_length)[0])
    asked, answer = dialogue_parts(row)
    whole_prompt, whole_answer = BYTES.prompt_ids(prompt), [*BYTES.encode_one(completion), 257]
    assert answer == whole_answer[: max_length - 1]
    assert asked[0] == 256
    assert asked[1:] == whole_prompt[len(whole_prompt) - len(asked) + 1 :]
    assert len(asked) + len(answer) == min(max_length, len(whole_prompt) + len(whole_answer))
    ids, flags = row.view(2, -1)
    assert bool(((ids >= 0) | (flags == 0)).all())
