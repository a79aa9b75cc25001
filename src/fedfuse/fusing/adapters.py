"""Fuse adapters that people already have into one folder that PEFT loads."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fedfuse.core.errors import ConfigError, ModelError, RegistryError, did_you_mean
from fedfuse.core.files import write_atomically
from fedfuse.core.places import local_folder
from fedfuse.core.registry import ADAPTER_RULES, RULES
from fedfuse.core.settings import from_json
from fedfuse.core.streaming import TensorWriter
from fedfuse.fusing.adapter import BIAS, Place
from fedfuse.fusing.adapter_config import FILE as CONFIG_FILE
from fedfuse.fusing.adapter_config import PREFIX
from fedfuse.fusing.base_model import BaseModel
from fedfuse.fusing.card import card, facts_of
from fedfuse.fusing.fusion import Fusion, open_fusion
from fedfuse.fusing.joint_config import joint_config
from fedfuse.fusing.measuring import ModuleError, measure, total
from fedfuse.ops.lora import Factors, is_finite, stacked
from fedfuse.rules.adapters import AdapterRule, FusedChange, Tensorwise

T = TypeVar("T")

FACTS = "fusion.json"
"""The file with everything that is known about a fusion."""
RESIDUAL, BASE = "residual", "base"
"""Folders in the result, of rules that make more than an adapter."""


_DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class FusedAdapters:
    """What was made of some adapters.

    Args:
        folder: where it lies.
        method: the rule's name.
        ranks: of the fused adapter, by module.
        num_bytes: of the fused adapter's tensors; 0 where there is none.
        errors: distance from the exact sum, by module; empty if it was not measured.
        notes: what a reader should know about this fusion.
    """

    folder: Path
    method: str
    ranks: Mapping[str, int]
    num_bytes: int
    errors: Mapping[str, ModuleError]
    notes: Sequence[str] = ()

    @property
    def error(self) -> ModuleError:
        """Of all modules together."""
        return total(self.errors)


def adapter_rule(method: str, rank: int | None = None, settings: Mapping[str, Any] | None = None) -> AdapterRule:
    """A rule for adapters by its name.

    Args:
        method: a name in the registry of adapter rules, or in that of rules, which then sees the adapters' changes.
        rank: of the result, for rules that choose one.
        settings: the rule's.

    Returns:
        The rule.

    Raises:
        RegistryError: there is no such rule.
        ConfigError: a setting or a rank that the rule does not have.
    """
    values = dict(settings or {}) | ({} if rank is None else {"rank": rank})
    if method in ADAPTER_RULES.names():
        kind = ADAPTER_RULES.get(method)
        if rank is not None and "rank" not in kind.__dataclass_fields__:
            raise ConfigError(
                f'the rule "{method}" chooses no rank',
                where="rank",
                fix="leave rank out, or use svd: the best of a rank",
            )
        rule: AdapterRule = from_json(kind, values, where="rule")
        return rule
    if method not in RULES.names():
        known = [*ADAPTER_RULES.names(), *RULES.names()]
        raise RegistryError(f'there is no rule "{method}" for adapters', fix=did_you_mean(method, known))
    on = str(values.pop("on", "deltas"))
    if on not in ("deltas", "factors"):
        raise ConfigError(f'on is "{on}"', where="rule.on", fix="give deltas or factors")
    if on == "factors" and rank is not None:
        raise ConfigError(
            f'the rule "{method}" on factors chooses no rank', where="rank", fix="leave rank out, or on=factors"
        )
    values.pop("rank", None)
    inner = from_json(RULES.get(method), values, where="rule")
    return Tensorwise(rule=inner, on="factors" if on == "factors" else "deltas", rank=rank)


def fuse_adapters(
    paths: Sequence[str | Path],
    *,
    method: str = "flora",
    weights: Sequence[float] | None = None,
    rank: int | None = None,
    base: str | Path | None = None,
    base_model: str = "",
    dtype: str = "auto",
    out: str | Path,
    measures: bool = True,
    hashes: bool = True,
    names: Sequence[str] | None = None,
    **settings: Any,
) -> FusedAdapters:
    """Fuse LoRA adapters of PEFT into one folder that PEFT loads.

    Ranks, alphas, rsLoRA, target modules and saved heads may differ: an adapter that does not touch a weight counts as
    no change of it, and what is saved whole is averaged over the adapters that hold it. Everything is computed in
    float64, module by module, so memory does not grow with the model. The order of the paths changes no bit.

    Args:
        paths: folders that ``save_pretrained`` of PEFT wrote, or names on the hub.
        method: ``flora``, ``svd``, ``average``, ``fedex``, ``merge``, or any rule for tensors.
        weights: one per path, equal if left out; scaled to sum to 1.
        rank: of the result, for ``svd`` and rules for tensors; the largest of the adapters' if left out.
        base: folder of the base model, for rules that change it: ``merge``, and ``fedex`` with ``residual=merged``.
        base_model: name of the base model, where the adapters call it by different ones.
        dtype: ``auto`` is the widest of the adapters'; else ``float64``, ``float32``, ``bfloat16`` or ``float16``.
        out: folder of the result.
        measures: whether to measure the distance from the exact sum.
        hashes: whether to write down the SHA-256 of all that went in.
        names: what the adapters are called in what is written, one per path; the paths if left out.
        settings: the rule's; with rules for tensors also ``on=factors``.

    Returns:
        Where the result lies, and how exact it is.

    Raises:
        ConfigError: settings that do not fit together.
    """
    rule = adapter_rule(method, rank, settings)
    if dtype not in (*_DTYPES, "auto"):
        raise ConfigError(f'there is no dtype "{dtype}"', where="dtype", fix=did_you_mean(dtype, [*_DTYPES, "auto"]))
    if (base is not None) != (rule.residual_goes == "base"):
        raise ConfigError(
            f'the rule "{method}" changes the base model, and there is none'
            if base is None
            else f'the rule "{method}" does not look at a base',
            where="base",
            fix="name the base model's folder" if base is None else "leave base out",
        )
    folder = Path(out)
    if any(folder.resolve() == Path(path).resolve() for path in (*paths, *([] if base is None else [base]))):
        raise ConfigError("the result would lie on what it is made of", where=str(out), fix="name another folder")
    with open_fusion(paths, weights, base_model=base_model, hashes=hashes, names=names) as fusion:
        work = _Work(method, fusion, rule, folder, fusion.dtype if dtype == "auto" else _DTYPES[dtype], measures)
        onto = None
        if base is not None:
            transposes = bool(fusion.adapters[0].config.table.get("fan_in_fan_out"))
            onto = BaseModel(local_folder(base), is_transposed=transposes)
            for module, place in fusion.modules.items():
                onto.check_fits(module, place)
        is_new = not folder.exists()
        try:
            return work.write(onto, settings if rank is None else {**settings, "rank": rank})
        except BaseException:
            if is_new:
                shutil.rmtree(folder, ignore_errors=True)
            raise


class _Work:
    """One fusion, written module by module."""

    def __init__(
        self, method: str, fusion: Fusion, rule: AdapterRule, folder: Path, dtype: torch.dtype, measures: bool
    ) -> None:
        self.method, self.fusion, self.rule, self.folder = method, fusion, rule, folder
        self.dtype, self.measures = dtype, measures
        self.ranks: dict[str, int] = {}
        self.residual_ranks: dict[str, int] = {}
        self.errors: dict[str, ModuleError] = {}
        fusion.check_rule(rule)
        self.weights = fusion.reweighed(rule)

    def write(self, onto: BaseModel | None, settings: Mapping[str, Any]) -> FusedAdapters:
        base_model = self.fusion.base_model
        if onto is not None:
            target = self.folder / BASE if self.rule.makes_adapter else self.folder
            self._write_base(onto, target)
            base_model = str(target)
        if self.rule.makes_adapter:
            self._write_adapter()
            self._write_config(self.folder, self.ranks, base_model, has_wholes=True)
            if self.residual_ranks:
                self._write_config(self.folder / RESIDUAL, self.residual_ranks, base_model, has_wholes=False)
        num_bytes = (self.folder / self.fusion.file_name).stat().st_size if self.rule.makes_adapter else 0
        result = FusedAdapters(self.folder, self.method, self.ranks, num_bytes, self.errors, tuple(self._notes()))
        facts = facts_of(
            result.method, settings, self.fusion, result.ranks, result.errors, result.notes, base_model=base_model
        )
        write_atomically(self.folder / FACTS, json.dumps(facts, indent=2, sort_keys=True).encode())
        write_atomically(self.folder / "README.md", card(facts, is_adapter=self.rule.makes_adapter).encode())
        return result

    def _write_adapter(self) -> None:
        wholes = {key: self.fusion.dtype_of_whole(key) for key in self._whole_keys()}
        targets = {key: self.dtype if dtype.is_floating_point else dtype for key, dtype in wholes.items()}
        # A reader maps tensors where they lie: those of wider elements come first.
        by_width = sorted(targets, key=lambda key: (-targets[key].itemsize, key))
        early = [key for key in by_width if targets[key].itemsize > self.dtype.itemsize]
        late = by_width[len(early) :]
        modules = self.fusion.modules.items()
        names = [
            place.prefix + module + tail for module, place in self.fusion.modules.items() for tail in _tails(place)
        ]
        with contextlib.ExitStack() as stack:
            writer = stack.enter_context(TensorWriter(self.folder / self.fusion.file_name, [*early, *names, *late]))
            apart: TensorWriter | None = None
            for key in early:
                writer.put(key, _rounded(self.fusion.whole(key), targets[key], key))
            ahead = stack.enter_context(contextlib.closing(_one_ahead(self._fused, list(self.fusion.modules))))
            for (module, place), (change, exact) in zip(modules, ahead, strict=True):
                saved = self._put(writer, module, place, change.adapter, self.ranks)
                rest = change.residual
                if rest is not None and rest.rank and self.rule.residual_goes == "apart":
                    if apart is None:
                        apart = stack.enter_context(TensorWriter(self.folder / RESIDUAL / self.fusion.file_name, names))
                    rest = self._put(apart, module, place, rest, self.residual_ranks)
                if exact is not None:
                    found = saved if rest is None else stacked([saved, rest], [1.0, 1.0])
                    self.errors[module] = measure(exact, found)
            if not self.ranks:
                raise ModelError("the fused change is zero", where=self.method, fix="give other weights or settings")
            for key in late:
                writer.put(key, _rounded(self.fusion.whole(key), targets[key], key))

    def _whole_keys(self) -> list[str]:
        """Tensors that are saved whole and belong into the result."""
        keys = self.fusion.whole_keys()
        if self.rule.residual_goes == "nowhere":
            return keys
        # PEFT saves a base's embedding beside the adapter of it, and would load it over the one that was changed.
        return [key for key in keys if ".base_layer." not in key]

    def _fused(self, module: str) -> tuple[FusedChange, Factors | None]:
        """What the rule makes of one module, and what it should be if that is measured."""
        parts = self.fusion.parts(module)
        exact = stacked(parts, self.fusion.weights) if self.measures else None
        return self.rule.fuse(parts, self.weights, module), exact

    def _put(self, writer: TensorWriter, module: str, place: Place, factors: Factors, ranks: dict[str, int]) -> Factors:
        """Write one module; gives its factors as they were rounded."""
        if not factors.rank:
            return factors
        stem = place.prefix + module
        left, right = (_rounded(factor, self.dtype, stem) for factor in place.stored(factors))
        tensors = {stem + place.left: left, stem + place.right: right}
        if ranks is self.ranks:
            bias = self.fusion.bias(module)
            if bias is not None:
                tensors[stem + BIAS] = _rounded(bias, self.dtype, stem)
            if place.magnitude:
                tensors[stem + place.magnitude] = _rounded(self.fusion.magnitude(module), self.dtype, stem)
        for key, tensor in sorted(tensors.items()):
            writer.put(key, tensor)
        ranks[module] = factors.rank
        return Factors(left.double().view(factors.left.shape), right.double().view(factors.right.shape))

    def _write_config(self, folder: Path, ranks: Mapping[str, int], base_model: str, *, has_wholes: bool) -> None:
        if self.fusion.adapters[0].is_pipeline:
            # A file without settings says by its form that every scale is 1.
            return
        table = joint_config(self.fusion.adapters, ranks, base_model=base_model, has_wholes=has_wholes)
        write_atomically(folder / CONFIG_FILE, json.dumps(table, indent=2, sort_keys=True).encode())

    def _write_base(self, onto: BaseModel, folder: Path) -> None:
        def change(module: str) -> Factors:
            fused, exact = self._fused(module)
            found = fused.residual or fused.adapter
            if exact is not None and not self.rule.makes_adapter:
                self.errors[module] = measure(exact, found)
            return found

        others: dict[str, Tensor] = {}
        if not self.rule.makes_adapter:
            for key in self._whole_keys():
                dtype = self.fusion.dtype_of_whole(key)
                others[onto.key_like(key.removeprefix(PREFIX))] = _rounded(self.fusion.whole(key), dtype, key)
            for module in self.fusion.modules:
                bias = self.fusion.bias(module)
                if bias is not None:
                    key, tensor = onto.bias(module, bias)
                    others[key] = tensor
        onto.write(folder, self.fusion.modules, change, others)

    def _notes(self) -> list[str]:
        adapters, notes = self.fusion.adapters, []
        partial = sorted(m for m in self.fusion.modules if not all(m in adapter.modules for adapter in adapters))
        if partial:
            notes.append(
                f"{len(partial)} weights are changed by some adapters only, and count as unchanged in the others"
            )
        keys = self._whole_keys()
        if keys:
            shared = [key for key in keys if all(key in adapter.wholes for adapter in adapters)]
            among = "" if len(shared) == len(keys) else f", {len(keys) - len(shared)} of them over those that hold them"
            notes.append(f"{len(keys)} tensors are saved whole and were averaged{among}")
        if adapters[0].config.is_dora:
            notes.append("DoRA: magnitudes were averaged; the error is of B A alone")
        if self.weights != self.fusion.weights:
            shown = ", ".join(f"{n} {w:.3g}" for n, w in zip(self.fusion.names, self.weights, strict=True))
            notes.append(f"the rule changed the weights to {shown}")
        if self.residual_ranks:
            notes.append(f"exact together with the adapter in {RESIDUAL}/, which belongs into the base model")
        if self.rule.residual_goes == "base":
            notes.append("the error is that before rounding to the base model's numbers")
        return notes


def _one_ahead(function: Callable[[str], T], items: Sequence[str]) -> Generator[T, None, None]:
    """Call a function on each item in turn, in another thread, while the caller works with the result before."""
    with ThreadPoolExecutor(1, "fedfuse-fuse") as pool:
        waiting: deque[Future[T]] = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > 1:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _tails(place: Place) -> tuple[str, ...]:
    """What may stand behind a module's name in the fused file."""
    return (place.left, place.right, BIAS, *([place.magnitude] if place.magnitude else []))


def _rounded(values: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """Float64 to the numbers that are stored."""
    found = values.to(dtype) if dtype.is_floating_point else values.round().to(dtype)
    if dtype.is_floating_point and not is_finite(found):
        raise ModelError(
            f'the fused "{key}" does not fit {str(dtype).removeprefix("torch.")}',
            where="dtype",
            fix="give dtype=float32",
        )
    return found
