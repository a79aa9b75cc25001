"""Writing a safetensors file tensor by tensor, so that memory does not grow with the file."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from fedfuse.core.errors import JournalError, PayloadError
from fedfuse.core.header import MAX_HEADER_BYTES, METADATA
from fedfuse.core.payload import check_key

_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.int32: "I32",
    torch.int64: "I64",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
    torch.float64: "F64",
}
# What a tensor's entry takes at most beside its name: dtype, eight sizes and two offsets of twenty digits.
_ENTRY_BYTES = 280


class TensorWriter:
    """A safetensors file that is written tensor by tensor, and is there whole or not at all.

    Used as a context manager: the file takes its name when the block ends well, and nothing is left when it does not.
    Room for the header is kept at the start, which the format allows to be filled up with blanks.

    Args:
        path: where; its folder is made if it is not there.
        names: of all tensors that may come; not all of them must.
        metadata: texts for the header; ``format`` is ``pt``, as programs that load models want it.

    Raises:
        PayloadError: there are more names than a header can hold.
    """

    def __init__(self, path: Path, names: Iterable[str], metadata: Mapping[str, str] | None = None) -> None:
        self.path = path
        self._header: dict[str, Any] = {METADATA: {"format": "pt", **(metadata or {})}}
        own = len(json.dumps(self._header))
        size = own + sum(len(json.dumps(name)) + _ENTRY_BYTES for name in names)
        self._header_bytes = size + -size % 8
        if self._header_bytes > MAX_HEADER_BYTES:
            raise PayloadError("there are more tensors than one file can name", where=str(path), fix="write several")
        self._num_bytes = 0
        self._smallest_item = 8
        self._temporary = ""

    def __enter__(self) -> TensorWriter:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, self._temporary = tempfile.mkstemp(
                dir=self.path.parent, prefix=f".{self.path.name}.", suffix=".part"
            )
            self._file = os.fdopen(descriptor, "wb")
            self._file.seek(8 + self._header_bytes)
        except OSError as error:
            raise self._cannot(error) from None
        return self

    def put(self, name: str, tensor: Tensor) -> None:
        """Write one tensor.

        Args:
            name: one that was announced, not written before.
            tensor: on the CPU. Tensors of wider elements come first, so that each lies where its reader can map it.

        Raises:
            PayloadError: the name stands there already, or the tensor cannot be written or comes too late.
        """
        check_key(name)
        if name in self._header:
            raise PayloadError(f'"{name}" is written twice', where=str(self.path))
        dtype = _DTYPES.get(tensor.dtype)
        if dtype is None or tensor.dim() > 8:
            raise PayloadError(f'"{name}" is a tensor of {tensor.dtype} {tuple(tensor.shape)}', where=str(self.path))
        if tensor.element_size() > self._smallest_item:
            raise PayloadError(
                f'"{name}" has wider elements than the tensor before it',
                where=str(self.path),
                fix="write tensors of wider elements first",
            )
        self._smallest_item = tensor.element_size()
        size = tensor.numel() * tensor.element_size()
        self._header[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [self._num_bytes, self._num_bytes + size],
        }
        self._num_bytes += size
        try:
            if size:
                self._file.write(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
        except OSError as error:
            raise self._cannot(error) from None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                header = json.dumps(self._header, separators=(",", ":")).encode().ljust(self._header_bytes)
                self._file.seek(0)
                self._file.write(len(header).to_bytes(8, "little") + header)
                mask = os.umask(0)
                os.umask(mask)
                os.fchmod(self._file.fileno(), 0o666 & ~mask)
                self._file.flush()
                os.fsync(self._file.fileno())
                self._file.close()
                os.replace(self._temporary, self.path)
        except OSError as wrong:
            raise self._cannot(wrong) from None
        finally:
            # What could not be written is still in the file's buffer, and closing tries once more.
            try:
                self._file.close()
            except OSError:
                pass
            if os.path.exists(self._temporary):
                os.unlink(self._temporary)

    def _cannot(self, error: OSError) -> JournalError:
        return JournalError(
            f"cannot write: {error.strerror}",
            where=str(self.path),
            fix="free disk space or name another folder, then run the same command again",
        )
