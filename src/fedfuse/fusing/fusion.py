"""Several adapters, opened and found alike."""

from __future__ import annotations

import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fedfuse.core.errors import ArtifactError, ConfigError, ModelError
from fedfuse.core.places import local_folder
from fedfuse.fusing.adapter import Adapter, Place
from fedfuse.fusing.joint_config import check_alike
from fedfuse.ops.lora import Factors, inner_product
from fedfuse.rules.adapters import AdapterRule


def shares_of(weights: Sequence[float] | None, num_adapters: int) -> list[float]:
    """Weights that sum to 1.

    Args:
        weights: as they were given; equal if left out.
        num_adapters: how many there must be.

    Returns:
        One per adapter.

    Raises:
        ConfigError: they are too few or too many, or cannot be weights.
    """
    given = [1.0] * num_adapters if weights is None else [float(weight) for weight in weights]
    if len(given) != num_adapters:
        raise ConfigError(
            f"there are {len(given)} weights for {num_adapters} adapters", where="weights", fix="give one per adapter"
        )
    wrong = next((weight for weight in given if not 0 <= weight < math.inf), None)
    if wrong is not None:
        raise ConfigError(f"{wrong} is no weight", where="weights", fix="give numbers that are 0 or more")
    whole = math.fsum(given)
    if not 0 < whole < math.inf:
        raise ConfigError(f"the weights sum to {whole}", where="weights", fix="give at least one a weight above 0")
    return [weight / whole for weight in given]


@dataclass
class Fusion:
    """Adapters that were opened and found alike, with their weights.

    The order is that of their content, so that the order in which they were named changes no bit.

    Args:
        names: as they were given.
        adapters: opened.
        weights: sum to 1.
        base_model: name of their base model.
        hashes: whether the SHA-256 of the adapters is wanted.
    """

    names: list[str]
    adapters: list[Adapter]
    weights: list[float]
    base_model: str
    hashes: bool = False
    modules: dict[str, Place] = field(init=False)
    has_biases: bool = field(init=False)

    def __post_init__(self) -> None:
        found: dict[str, Place] = {}
        for adapter in self.adapters:
            found |= {module: place for module, place in adapter.modules.items() if module not in found}
        self.modules = dict(sorted(found.items()))
        self.has_biases = any(place.has_bias for adapter in self.adapters for place in adapter.modules.values())

    @property
    def file_name(self) -> str:
        """Of the tensors of the result: that of the adapters'."""
        return self.adapters[0].files[-1]

    @property
    def dtype(self) -> torch.dtype:
        """The narrowest that holds all floating-point tensors of all."""
        widest = self.adapters[0].dtype
        for adapter in self.adapters:
            widest = torch.promote_types(widest, adapter.dtype)
        return widest

    def parts(self, module: str) -> list[Factors]:
        """Every adapter's change of a weight, of rank 0 where it has none.

        Args:
            module: its name.

        Returns:
            One per adapter.
        """
        height, width = self.modules[module].shape
        nothing = Factors(torch.zeros(height, 0, dtype=torch.float64), torch.zeros(0, width, dtype=torch.float64))
        return [adapter.factors(module) if module in adapter.modules else nothing for adapter in self.adapters]

    def check_rule(self, rule: AdapterRule) -> None:
        """Refuse a rule that cannot fuse these adapters, before anything is read.

        Args:
            rule: the rule.

        Raises:
            ModelError: it cannot.
        """
        for module, place in self.modules.items():
            rule.check_shape(module, place.shape)
        if self.adapters[0].config.is_dora and not rule.of_factors:
            raise ModelError(
                "DoRA adapters have no sum: each rescales the base's whole weight",
                where=self.names[0],
                fix="use the rule average, or merge each into its base and fuse the checkpoints",
            )

    def reweighed(self, rule: AdapterRule) -> list[float]:
        """The weights, after the rule has seen how far apart the adapters are.

        Args:
            rule: it may not want to.

        Returns:
            One per adapter.
        """
        if not rule.of_whole_models:
            return self.weights
        count = len(self.adapters)
        gram = torch.zeros(count, count, dtype=torch.float64)
        for module in self.modules:
            parts = self.parts(module)
            for row in range(count):
                for column in range(row, count):
                    gram[row, column] += inner_product(parts[row], parts[column])
        gram = gram.triu() + gram.triu(1).T
        squares = gram.diagonal()
        distances = (squares[:, None] + squares - 2 * gram).clamp(min=0).fill_diagonal_(0)
        return [float(weight) for weight in rule.reweigh(distances, torch.tensor(self.weights, dtype=torch.float64))]

    def whole_keys(self) -> list[str]:
        """Keys of tensors that any adapter saves whole: heads, biases, embeddings."""
        return sorted({key for adapter in self.adapters for key in adapter.wholes})

    def dtype_of_whole(self, key: str) -> torch.dtype:
        """That of such a tensor, in the first adapter that holds it.

        Args:
            key: in the file.
        """
        return next(adapter for adapter in self.adapters if key in adapter.wholes).looks(key)[1]

    def whole(self, key: str) -> Tensor:
        """Mean of such a tensor over the adapters that hold it.

        Args:
            key: in the file.

        Returns:
            The mean, in float64.
        """
        return self._mean({n: a.tensor(key) for n, a in enumerate(self.adapters) if key in a.wholes})

    def magnitude(self, module: str) -> Tensor:
        """Mean of DoRA's magnitudes over the adapters that have them.

        Args:
            module: its name.

        Returns:
            The mean, in float64.
        """
        holders = {n: a.magnitude(module) for n, a in enumerate(self.adapters) if module in a.modules}
        return self._mean(holders)

    def bias(self, module: str) -> Tensor | None:
        """Weighted sum of the biases of B; nothing if no adapter has one anywhere.

        Args:
            module: its name.

        Returns:
            The sum, in float64.
        """
        if not self.has_biases:
            return None
        summed = torch.zeros(self.modules[module].shape[0], dtype=torch.float64)
        for adapter, weight in zip(self.adapters, self.weights, strict=True):
            if module in adapter.modules and adapter.modules[module].has_bias:
                summed += weight * adapter.bias(module)
        return summed

    def _mean(self, values: Mapping[int, Tensor]) -> Tensor:
        weights = [self.weights[number] for number in values]
        whole = math.fsum(weights)
        if whole == 0:
            weights, whole = [1.0] * len(values), float(len(values))
        summed = torch.zeros_like(next(iter(values.values())), dtype=torch.float64)
        for value, weight in zip(values.values(), weights, strict=True):
            summed += (weight / whole) * value.double()
        return summed


@contextlib.contextmanager
def open_fusion(
    paths: Sequence[str | Path],
    weights: Sequence[float] | None = None,
    *,
    base_model: str = "",
    hashes: bool = False,
    names: Sequence[str] | None = None,
) -> Iterator[Fusion]:
    """Open adapters, check that they belong together, and close them.

    Args:
        paths: folders, or names on the hub.
        weights: one per path, equal if left out; scaled to sum to 1.
        base_model: name of the base model, where the adapters call it by different ones.
        hashes: whether the SHA-256 of the adapters is wanted.
        names: what the adapters are called, one per path; the paths if left out.

    Yields:
        The adapters.

    Raises:
        ConfigError: there are none, or weights do not fit.
    """
    if not paths:
        raise ConfigError("there is nothing to fuse", where="paths", fix="give at least one adapter")
    shares = shares_of(weights, len(paths))
    adapters = [Adapter(local_folder(path)) for path in paths]
    names = [str(path) for path in paths] if names is None else names
    odd = next((adapter for adapter in adapters if adapter.is_pipeline != adapters[0].is_pipeline), None)
    if odd is not None:
        raise ArtifactError(
            "adapters of PEFT and LoRA files of diffusers do not mix",
            where=str(odd.folder),
            fix="save all by load_lora_weights and save_lora_weights of the pipeline",
        )
    check_alike(names, adapters, base_model=base_model)
    counts = Counter(adapter.beginning for adapter in adapters)
    rests = [adapter.digest if counts[adapter.beginning] > 1 else "" for adapter in adapters]
    settings = [json.dumps(adapter.config.table, sort_keys=True) for adapter in adapters]
    order = sorted(range(len(paths)), key=lambda n: (adapters[n].beginning, rests[n], settings[n], shares[n]))
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(1, "fedfuse-digest") as pool:
        # They are wanted at the end; hashing leaves the interpreter to the others.
        for number in order if hashes else ():
            pool.submit(lambda adapter: adapter.digest, adapters[number])
        yield Fusion(
            [names[n] for n in order],
            [stack.enter_context(adapters[n]) for n in order],
            [shares[n] for n in order],
            base_model or next((a.config.base_model for a in adapters if a.config.base_model), ""),
            hashes,
        )
