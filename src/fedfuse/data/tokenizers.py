"""Texts to token ids and back: bytes, or the tokenizer of a folder or of the hub."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.data.checks import optional_module

BYTES = "bytes"
"""Name of the tokenizer that needs no file."""

PADDING = -1.0
"""What fills the places after a text's last token."""

_FILES = ["tokenizer*", "special_tokens_map.json", "chat_template*", "vocab*", "merges.txt", "*.model", "config.json"]
_END_NAMES = ("eos_token", "sep_token")


class Tokens(ABC):
    """A tokenizer.

    Args:
        name: as it was asked for.
        vocab_size: one more than the largest id.
        prefix: ids that stand before every text.
        suffix: ids that stand after a text that is classified.
        chat_template: the tokenizer's own Jinja template of a conversation; empty where it has none.
        special_tokens: text of each special token by its role, such as ``eos_token``; templates use them.
    """

    def __init__(
        self,
        name: str,
        vocab_size: int,
        prefix: Sequence[int],
        suffix: Sequence[int],
        chat_template: str = "",
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.name, self.vocab_size = name, vocab_size
        self.prefix, self.suffix = list(prefix), list(suffix)
        self.chat_template, self.special_tokens = chat_template, dict(special_tokens or {})

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of everything that decides the ids, 64 hexadecimal digits."""

    @property
    @abstractmethod
    def end_id(self) -> int:
        """The token that ends a completion."""

    @abstractmethod
    def encode_one(self, text: str) -> list[int]:
        """Ids of a text, without those that stand before and after it.

        Args:
            text: any length.

        Returns:
            As many ids as the text needs.
        """

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; special tokens and padding are left out.

        Args:
            ids: token ids.

        Returns:
            The text.
        """

    def encode(self, texts: Sequence[str], max_length: int) -> np.ndarray:
        """Texts to rows of ids for a classifier: prefix, text, suffix; a long text is cut on its right.

        Args:
            texts: any number.
            max_length: ids in a row, more than prefix and suffix take.

        Returns:
            float32, shape ``(len(texts), max_length)``, -1 after the last id.

        Raises:
            ConfigError: the rows are too short for any text.
        """
        room = max_length - len(self.prefix) - len(self.suffix)
        if room < 1:
            raise ConfigError(
                f"max_length is {max_length}, and {max_length - room} of it are the tokenizer's own",
                where="data.max_length",
                fix=f"give at least {max_length - room + 1}",
            )
        rows = np.full((len(texts), max_length), PADDING, dtype=np.float32)
        for row, text in zip(rows, texts, strict=True):
            ids = self.prefix + self.encode_one(text)[:room] + self.suffix
            row[: len(ids)] = ids
        return rows

    def chat(self, prompt: str) -> str:
        """A prompt as the model was taught to read it, up to where its answer begins.

        Args:
            prompt: what is asked.

        Returns:
            By the tokenizer's own template; without one the prompt and a line break.

        Raises:
            DataError: the template cannot be used.
        """
        if not self.chat_template:
            return plain_prompt(prompt)
        from jinja2 import TemplateError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> str:
            raise TemplateError(message)

        surroundings = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        surroundings.globals["raise_exception"] = refuse
        try:
            template = surroundings.from_string(self.chat_template)
            messages = [{"role": "user", "content": prompt}]
            return template.render(messages=messages, add_generation_prompt=True, **self.special_tokens)
        except TemplateError as error:
            raise DataError(
                f"the chat template cannot be used: {error}", where=self.name, fix="set chat_template to none"
            ) from None

    def prompt_ids(self, prompt: str, *, is_chat: bool = True) -> list[int]:
        """Ids of a prompt, up to where its answer begins.

        Args:
            prompt: what is asked.
            is_chat: by the tokenizer's own template where it has one; else always the prompt and a line break.

        Returns:
            With what stands before every text, unless the template writes it.
        """
        if not (is_chat and self.chat_template):
            return self.prefix + self.encode_one(plain_prompt(prompt))
        return self.encode_one(self.chat(prompt))


class ByteTokens(Tokens):
    """Every byte of UTF-8 is a token; 256 begins a text and 257 ends it."""

    def __init__(self) -> None:
        super().__init__(BYTES, 258, [256], [257])

    @property
    def digest(self) -> str:
        """SHA-256 of the name of the scheme."""
        return hashlib.sha256(b"bytes, begin 256, end 257").hexdigest()

    @property
    def end_id(self) -> int:
        """257."""
        return 257

    def encode_one(self, text: str) -> list[int]:
        """Bytes of the text.

        Args:
            text: any length.

        Returns:
            Whole numbers 0 to 255.

        Example:
            >>> ByteTokens().encode_one("hi")
            [104, 105]
        """
        return list(text.encode())

    def decode(self, ids: Sequence[int]) -> str:
        """Bytes to text; what is no byte is left out, and what is no UTF-8 becomes a replacement character.

        Args:
            ids: token ids.

        Returns:
            The text.
        """
        return bytes(int(i) for i in ids if 0 <= i < 256).decode(errors="replace")


class FileTokens(Tokens):
    """The tokenizer of a model, by the library ``tokenizers``.

    Args:
        name: as it was asked for.
        content: text of ``tokenizer.json``.
        chat_template: the Jinja template of a conversation; empty where there is none.
        special_tokens: text of each special token by its role.

    Raises:
        DataError: the content is no tokenizer.
    """

    def __init__(self, name: str, content: str, chat_template: str, special_tokens: Mapping[str, str]) -> None:
        library = optional_module("tokenizers", package="tokenizers", extra="hf")
        try:
            self._tokenizer = library.Tokenizer.from_str(content)
        except Exception as error:  # the library raises plain exceptions
            raise DataError(
                f"tokenizer.json cannot be read: {error}", where=name, fix="copy the model's folder again"
            ) from None
        # Files may bring a fixed length of their own.
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        bare = self._tokenizer.encode("a", add_special_tokens=False).ids
        whole = self._tokenizer.encode("a").ids
        start = next((i for i in range(len(whole)) if whole[i : i + len(bare)] == bare), 0)
        vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        super().__init__(
            name, vocab_size, whole[:start], whole[start + len(bare) :], chat_template, special_tokens=special_tokens
        )
        facts = [content, chat_template, sorted(special_tokens.items())]
        self._digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    @property
    def digest(self) -> str:
        """SHA-256 of the tokenizer's file, its template and the names of its special tokens."""
        return self._digest

    @property
    def end_id(self) -> int:
        """The token that ends a completion.

        Raises:
            DataError: the tokenizer names none.
        """
        for role in _END_NAMES:
            found = self._tokenizer.token_to_id(self.special_tokens.get(role, ""))
            if found is not None:
                return int(found)
        raise DataError(
            "the tokenizer names no token that ends a text",
            where=self.name,
            fix="set eos_token in its tokenizer_config.json",
        )

    def encode_one(self, text: str) -> list[int]:
        """Ids of a text; special tokens that it spells out are taken for such.

        Args:
            text: any length.

        Returns:
            As many ids as the text needs.
        """
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids.

        Args:
            ids: token ids; special ones and padding are left out.

        Returns:
            The text.
        """
        return str(self._tokenizer.decode([int(i) for i in ids if i >= 0], skip_special_tokens=True))


def plain_prompt(prompt: str) -> str:
    r"""A prompt for a model that was taught no conversation.

    Args:
        prompt: what is asked.

    Returns:
        The prompt without spaces around it, and a line break: the answer stands on a line of its own.

    Example:
        >>> plain_prompt("Is it raining? ")
        'Is it raining?\n'
    """
    return prompt.strip() + "\n"


def open_tokenizer(name: str) -> Tokens:
    """Open a tokenizer.

    Args:
        name: ``bytes``, a folder or a ``tokenizer.json``, or an id on the Hugging Face hub.

    Returns:
        The tokenizer.

    Raises:
        DataError: there is none of this name, or its files cannot be used.

    Example:
        >>> open_tokenizer("bytes").encode(["hi"], 6).tolist()
        [[256.0, 104.0, 105.0, 257.0, -1.0, -1.0]]
    """
    if name == BYTES:
        return ByteTokens()
    path = Path(name).expanduser()
    if path.is_file():
        return FileTokens(name, _text(path), *_facts(path.parent))
    folder = path if path.is_dir() else _downloaded(name)
    file = folder / "tokenizer.json"
    return FileTokens(name, _text(file) if file.is_file() else _converted(folder, name), *_facts(folder))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the file cannot be read: {error}", where=str(path), fix="copy it again") from None


def _facts(folder: Path) -> tuple[str, dict[str, str]]:
    """Chat template and special tokens, as transformers writes them beside a tokenizer."""
    config: dict[str, Any] = {}
    for file in (folder / "special_tokens_map.json", folder / "tokenizer_config.json"):
        if not file.is_file():
            continue
        try:
            found = json.loads(_text(file))
        except ValueError:
            raise DataError("the file is no JSON", where=str(file), fix="copy it again") from None
        config.update(found if isinstance(found, dict) else {})
    special = {}
    for role, token in config.items():
        text = token.get("content") if isinstance(token, dict) else token
        if role.endswith("_token") and isinstance(text, str):
            special[role] = text
    template = config.get("chat_template") or ""
    if isinstance(template, list):
        named = {str(entry.get("name")): str(entry.get("template", "")) for entry in template}
        template = named.get("default", "")
    beside = folder / "chat_template.jinja"
    return _text(beside) if beside.is_file() else str(template), special


def _downloaded(name: str) -> Path:
    """Files of the hub, or of its cache on this machine."""
    hub = optional_module("huggingface_hub", package="huggingface_hub", extra="hf")
    try:
        return Path(hub.snapshot_download(name, allow_patterns=_FILES))
    except Exception:  # the hub's client raises many kinds, none of which names what a reader can do
        raise DataError(
            f'there is no folder "{name}", and the hub gives no tokenizer of this name',
            where="tokenizer",
            fix="name the folder of a model, an id on the hub (with a network), or bytes",
        ) from None


def _converted(folder: Path, name: str) -> str:
    """The tokenizer of older files, in today's form."""
    transformers = optional_module("transformers", package="transformers", extra="hf")
    try:
        fast = transformers.AutoTokenizer.from_pretrained(str(folder))
        return str(fast.backend_tokenizer.to_str())
    except Exception as error:  # many kinds, by the kind of the tokenizer
        raise DataError(
            f"the folder holds no tokenizer: {type(error).__name__}",
            where=name,
            fix="name a folder with a tokenizer.json, or bytes",
        ) from None
