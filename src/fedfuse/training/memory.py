"""Keep freed memory for the next step, where the C library can be told to."""

from __future__ import annotations

import ctypes
import sys

# Numbers of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGEST_MMAP_THRESHOLD = 32 << 20
_KEPT_BYTES = 1 << 30


def keep_freed_memory() -> bool:
    """Let the allocator keep up to a GiB that is free, and take blocks of up to 32 MiB from it.

    A training step frees and asks for the same tensors again and again; given back to the system in between, every
    page of them must be mapped and cleared anew, which on some machines takes longer than the computation.

    Returns:
        Whether the C library took the advice; only glibc does.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        library = ctypes.CDLL(None)
        settings = {_ARENA_MAX: 1, _MMAP_THRESHOLD: _LARGEST_MMAP_THRESHOLD, _TRIM_THRESHOLD: _KEPT_BYTES}
        return all(library.mallopt(name, value) for name, value in settings.items())
    except (OSError, AttributeError):
        return False
