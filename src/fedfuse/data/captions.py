"""Captions made from names of classes, and a vocabulary of whole words."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from fedfuse.core.errors import ConfigError
from fedfuse.core.seeding import Rng
from fedfuse.data.tokenizers import FileTokens, Tokens, open_tokenizer

WORDS = "words"
"""Name of the tokenizer whose tokens are the words of the training captions."""

PLACE = "{class}"
"""What a template holds where the name of the class stands."""

TEMPLATES = ("a photo of a {class}", "a picture of a {class}", "a {class}", "one {class}, and nothing else")
"""What captions are made from where nothing else is set."""

_UNKNOWN = "<unknown>"


def check_templates(templates: Sequence[str]) -> None:
    """Refuse templates that cannot make captions.

    Args:
        templates: as set.

    Raises:
        ConfigError: there are none, or one has no place for the class.
    """
    if not templates:
        raise ConfigError(
            "there are no templates", where="source.templates", fix=f'give some, such as "{TEMPLATES[0]}"'
        )
    for template in templates:
        if PLACE not in template:
            raise ConfigError(
                f'the template "{template}" has no {PLACE}',
                where="source.templates",
                fix=f'write {PLACE} where the name of the class belongs, as in "{TEMPLATES[0]}"',
            )


def class_captions(labels: np.ndarray, class_names: Sequence[str], templates: Sequence[str], rng: Rng) -> list[str]:
    """A caption for each label, by a template that is drawn for it.

    Args:
        labels: class of each picture, shape ``(n,)``.
        class_names: in label order; underscores are read as spaces.
        templates: at least one.
        rng: draws them in the order of the rows, so that fewer rows keep their captions.

    Returns:
        One text per label.
    """
    drawn = rng.numpy("captions").integers(len(templates), size=len(labels))
    names = [name.replace("_", " ") for name in class_names]
    return [
        templates[which].replace(PLACE, names[label])
        for which, label in zip(drawn.tolist(), labels.tolist(), strict=True)
    ]


def caption_tokens(name: str, captions: Iterable[str]) -> Tokens:
    """The tokenizer of that name.

    Args:
        name: ``words``, or what :func:`fedfuse.data.tokenizers.open_tokenizer` takes.
        captions: where the words are taken from; not read for other tokenizers.

    Returns:
        The tokenizer.
    """
    return FileTokens(WORDS, words_file(captions), "", {}) if name == WORDS else open_tokenizer(name)


def words_file(captions: Iterable[str]) -> str:
    """A ``tokenizer.json`` whose tokens are the words and signs of some captions, in small letters and sorted order.

    Args:
        captions: any number.

    Returns:
        The file's text; token 0 stands for every other word.

    Example:
        >>> json.loads(words_file(["A cat.", "a dog"]))["model"]["vocab"]
        {'<unknown>': 0, '.': 1, 'a': 2, 'cat': 3, 'dog': 4}
    """
    # As the pre-tokenizer "Whitespace" cuts: words, and runs of other signs.
    words = sorted({word for caption in captions for word in re.findall(r"\w+|[^\w\s]+", caption.lower())})
    content: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "WordLevel",
            "vocab": {word: number for number, word in enumerate([_UNKNOWN, *words])},
            "unk_token": _UNKNOWN,
        },
    }
    return json.dumps(content)
