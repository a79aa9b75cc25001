from __future__ import annotations

import numpy as np
import pytest

from fedfuse.core.errors import ConfigError
from fedfuse.core.seeding import Rng
from fedfuse.data.captions import caption_tokens, check_templates, class_captions

NAMES = ("dog", "fire_truck")
TEMPLATES = ("a {class}", "one {class}!")


def test_a_caption_names_the_class() -> None:
    labels = np.array([0, 1, 1, 0] * 10)
    captions = class_captions(labels, NAMES, TEMPLATES, Rng(0))
    for label, caption in zip(labels, captions, strict=True):
        name = ("dog", "fire truck")[label]
        assert caption in (f"a {name}", f"one {name}!")
    assert len(set(captions)) == 4
    assert class_captions(labels[:7], NAMES, TEMPLATES, Rng(0)) == captions[:7]
    assert class_captions(labels, NAMES, TEMPLATES, Rng(1)) != captions


def test_templates_without_a_place_are_refused() -> None:
    with pytest.raises(ConfigError) as error:
        check_templates(["a {class}", "a photo"])
    assert (error.value.what, error.value.where, error.value.fix) == (
        'the template "a photo" has no {class}',
        "source.templates",
        'write {class} where the name of the class belongs, as in "a photo of a {class}"',
    )
    with pytest.raises(ConfigError, match="there are no templates"):
        check_templates([])


def test_words_are_tokens() -> None:
    tokens = caption_tokens("words", ["A dog!", "one cat"])
    assert tokens.vocab_size == 6  # <unknown> ! a cat dog one
    assert tokens.encode(["one dog!", "a bird", ""], 4).tolist() == [[5, 4, 1, -1], [2, 0, -1, -1], [-1] * 4]
    assert tokens.decode([2, 3]) == "a cat"
    assert tokens.digest == caption_tokens("words", ["one", "cat dog a", "!"]).digest
    assert caption_tokens("bytes", []).encode(["a"], 3).tolist() == [[256, 97, 257]]
