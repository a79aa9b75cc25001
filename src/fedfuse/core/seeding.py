"""Randomness that is derived, never consumed.

Every random choice has a name, and its seed is a hash of the run's seed and that name. So nothing depends on the
order in which clients are served, on the number of workers, or on what was drawn before.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """Hash some names to a seed.

    Args:
        parts: the run's seed and the names that lead to the choice, such as a client id and an exchange.

    Returns:
        An integer in [0, 2**63).

    Example:
        >>> derive_seed(0, "client_0", "train") == derive_seed(0, "client_0", "train")
        True
        >>> derive_seed(0, "a", "b") == derive_seed(0, "ab")
        False
    """
    text = json.dumps(list(parts), separators=(",", ":"), ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@dataclass(frozen=True)
class Rng:
    """A named source of random generators; a value, without a state that moves.

    Args:
        seed: where every stream of it starts.
        secret: known to the client alone; decides what :meth:`private_key` gives, and nothing else.
    """

    seed: int
    secret: bytes = field(default=b"", repr=False)

    def child(self, *names: int | str) -> Rng:
        """A source of its own for a part of the work.

        Args:
            names: what the part is called.
        """
        return Rng(derive_seed(self.seed, *names), self.secret)

    def private_key(self, *names: int | str) -> bytes:
        """A key for noise that hides something, which nobody can repeat who knows the seed alone.

        Without a secret, in a simulation, it is derived from the seed like everything else.

        Args:
            names: what the key is for; the same names give the same key.

        Returns:
            32 bytes.
        """
        text = json.dumps([self.seed, "private", *names], separators=(",", ":"), ensure_ascii=True)
        return hmac.digest(self.secret or b"no secret", text.encode(), "sha256")

    def torch(self, *names: int | str, device: torch.device | str = "cpu") -> torch.Generator:
        """A fresh torch generator for the stream of that name.

        Args:
            names: what the stream is for; the same names give the same numbers.
            device: where the generator draws.
        """
        generator = torch.Generator(device=device)
        generator.manual_seed(derive_seed(self.seed, *names))
        return generator

    def numpy(self, *names: int | str) -> np.random.Generator:
        """A fresh numpy generator for the stream of that name.

        Args:
            names: what the stream is for; the same names give the same numbers.
        """
        return np.random.default_rng(derive_seed(self.seed, *names))

    @contextmanager
    def ambient(self, *names: int | str) -> Iterator[None]:
        """Seed the global generators of python, numpy and torch for a while, then put them back.

        Layers such as dropout, and the initialisation of a user's own module, draw from the global generators.

        Args:
            names: what the stream is for.

        Yields:
            Nothing.
        """
        seed = derive_seed(self.seed, *names)
        python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
        cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # torch.manual_seed would also record a traceback for a GPU that may never be used.
        torch.default_generator.manual_seed(seed)
        if cuda_states:
            torch.cuda.manual_seed_all(seed)
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
            torch.set_rng_state(torch_state)
            if cuda_states:
                torch.cuda.set_rng_state_all(cuda_states)
