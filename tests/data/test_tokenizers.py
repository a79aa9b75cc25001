from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.data.tokenizers import open_tokenizer

tokenizers = pytest.importorskip("tokenizers")

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message['role'] }}]{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[answer]{% endif %}"
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Words a, b, c and unknown; <s> before a text; two special tokens."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3, "b": 4, "c": 5}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<s>", "</s>"])
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    # As sentence encoders ship it: cut to 2 and filled to 3.
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=3)
    path = tmp_path / "words"
    path.mkdir()
    tokenizer.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    return path


def test_bytes_need_no_file() -> None:
    tokens = open_tokenizer("bytes")
    assert (tokens.vocab_size, tokens.prefix, tokens.suffix, tokens.end_id) == (258, [256], [257], 257)
    rows = tokens.encode(["é", "abcdef"], 5)
    assert rows.dtype == np.float32
    assert rows.tolist() == [[256, 0xC3, 0xA9, 257, -1], [256, 97, 98, 99, 257]]
    assert tokens.decode([256, 0xC3, 0xA9, 257, -1]) == "é"
    assert tokens.decode([0xC3]) == "\N{REPLACEMENT CHARACTER}"
    assert tokens.prompt_ids(" hi ") == [256, 104, 105, 10]


def test_a_folder_is_read_without_its_own_lengths(folder: Path) -> None:
    tokens = open_tokenizer(str(folder))
    assert (tokens.vocab_size, tokens.prefix, tokens.suffix, tokens.end_id) == (6, [1], [], 2)
    assert tokens.encode(["a b c", "z"], 5).tolist() == [[1, 3, 4, 5, -1], [1, 0, -1, -1, -1]]
    assert tokens.encode(["a b c"], 3).tolist() == [[1, 3, 4]]
    assert tokens.decode([1, 3, 5, 2, -1]) == "a c"
    assert tokens.prompt_ids("a b") == [1, 3, 4]
    assert open_tokenizer(str(folder / "tokenizer.json")).digest == tokens.digest


def test_a_prompt_is_written_by_the_template_of_the_folder(folder: Path) -> None:
    plain = open_tokenizer(str(folder))
    assert plain.chat("a b ") == "a b\n"
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    tokens = open_tokenizer(str(folder))
    assert tokens.chat("a") == "<s>[user]a[answer]"
    # The template writes what stands before every text itself.
    assert tokens.prompt_ids(" a ")[:1] == [1]
    assert tokens.prompt_ids("a", is_chat=False) == [1, 3]
    assert tokens.digest != plain.digest


def test_a_template_may_stand_in_the_configuration_and_may_refuse(folder: Path) -> None:
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    refusing = "{{ raise_exception('one role only') }}"
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": refusing}]
    file.write_text(json.dumps({**config, "chat_template": named}))
    with pytest.raises(DataError) as error:
        open_tokenizer(str(folder)).chat("a")
    assert str(error.value) == (
        f"the chat template cannot be used: one role only\n  where: {folder}\n  fix:   set chat_template to none"
    )


def test_a_template_cannot_reach_python(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__ }}")
    with pytest.raises(DataError, match="the chat template cannot be used: access to attribute '__class__'"):
        open_tokenizer(str(folder)).chat("a")


def test_rows_without_room_are_refused(folder: Path) -> None:
    with pytest.raises(ConfigError) as error:
        open_tokenizer("bytes").encode(["a"], 2)
    assert str(error.value) == (
        "max_length is 2, and 2 of it are the tokenizer's own\n  where: data.max_length\n  fix:   give at least 3"
    )
    assert open_tokenizer(str(folder)).encode(["a"], 2).tolist() == [[1, 3]]


def test_what_is_no_tokenizer_is_said(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError) as error:
        open_tokenizer("no/such")
    assert str(error.value) == (
        'there is no folder "no/such", and the hub gives no tokenizer of this name\n  where: tokenizer\n'
        "  fix:   name the folder of a model, an id on the hub (with a network), or bytes"
    )
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match=r"^tokenizer.json cannot be read: ") as error:
        open_tokenizer(str(folder))
    assert (error.value.where, error.value.fix) == (str(folder), "copy the model's folder again")
    (folder / "tokenizer_config.json").write_text("[")
    with pytest.raises(DataError, match="the file is no JSON"):
        open_tokenizer(str(folder))


def test_a_tokenizer_without_an_end_says_so_when_it_is_needed(folder: Path) -> None:
    (folder / "tokenizer_config.json").unlink()
    tokens = open_tokenizer(str(folder))
    with pytest.raises(DataError) as error:
        _ = tokens.end_id
    assert str(error.value) == (
        f"the tokenizer names no token that ends a text\n  where: {folder}\n"
        "  fix:   set eos_token in its tokenizer_config.json"
    )


@pytest.mark.slow
def test_older_files_are_converted_and_an_empty_folder_is_none(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "bert").mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world"]
    (tmp_path / "bert" / "vocab.txt").write_text("\n".join(words))
    config = {"tokenizer_class": "BertTokenizer", "sep_token": "[SEP]"}
    (tmp_path / "bert" / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "bert" / "config.json").write_text(json.dumps({"model_type": "bert"}))
    tokens = open_tokenizer(str(tmp_path / "bert"))
    assert tokens.encode(["Hello world"], 5).tolist() == [[2, 5, 6, 3, -1]]
    assert tokens.end_id == 3
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="the folder holds no tokenizer: ") as error:
        open_tokenizer(str(tmp_path / "empty"))
    assert error.value.fix == "name a folder with a tokenizer.json, or bytes"
