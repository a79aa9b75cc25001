"""Networks of parallel columns: blocks of several clients side by side, joined by adaptors, under one linear head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedfuse.core.artifact import Recipe, build
from fedfuse.core.errors import ModelError
from fedfuse.core.registry import register_recipe
from fedfuse.models.parallel import fastest_way, parallel

ADAPTORS = ("conv1x1", "mean", "attention")
FEATURES = ("mean", "concat")


def check_side_by_side(shapes: Sequence[Sequence[int]]) -> None:
    """Refuse maps that differ in more than their channels.

    Args:
        shapes: without the batch, one per column.

    Raises:
        ModelError: they do.
    """
    around = {
        (*shape[: channel_dim(len(shape) + 1) - 1], -1, *shape[channel_dim(len(shape) + 1) :])
        for shape in map(tuple, shapes)
    }
    if len(around) > 1:
        raise ModelError(
            f"blocks of one level end in maps that do not fit side by side: {sorted(set(map(tuple, shapes)))}",
            fix="cut the clients' models at places of equal spatial size (method.points), or use other models",
        )


def channel_dim(ndim: int) -> int:
    """Where the channels of a feature map are: ``(n, c, h, w)`` and ``(n, d)`` at 1, tokens ``(n, t, d)`` at 2.

    Args:
        ndim: dimensions of the map with the batch.
    """
    return 2 if ndim == 3 else 1


class Adaptor(nn.Module):
    """Turns the feature maps of all clients into the input of one client's next block.

    ``conv1x1`` joins the maps over channels and mixes them by a 1x1 convolution (a linear layer for vectors and
    tokens); ``mean`` averages them; ``attention`` averages them with softmax weights computed per position.

    Args:
        kind: one of the above.
        num_channels: channels of each map.
        out_channels: channels that the block takes.
        ndim: dimensions of a map with the batch.

    Raises:
        ModelError: the kind does not exist, or cannot take maps of different widths.
    """

    def __init__(self, kind: str, num_channels: Sequence[int], out_channels: int, ndim: int) -> None:
        super().__init__()
        self.kind, self.num_channels, self.ndim = kind, tuple(num_channels), ndim
        if kind not in ADAPTORS:
            raise ModelError(f'there is no adaptor "{kind}"', fix=f"use one of {', '.join(ADAPTORS)}")
        if kind != "conv1x1" and set(num_channels) != {out_channels}:
            raise ModelError(
                f'the adaptor "{kind}" cannot join maps of {sorted(set(num_channels))} channels into {out_channels}',
                fix="use adaptor: conv1x1 for clients with models of different widths",
            )
        joined = sum(num_channels)
        if kind == "conv1x1":
            self.mix: nn.Module = nn.Conv2d(joined, out_channels, 1) if ndim == 4 else nn.Linear(joined, out_channels)
        elif kind == "attention":
            inner = max(4, out_channels // 4)
            self.query, self.key = nn.Linear(out_channels, inner), nn.Linear(out_channels, inner)

    def forward(self, joined: Tensor) -> Tensor:
        """Map the joined feature maps to one.

        Args:
            joined: all maps, concatenated over channels.

        Returns:
            A map with ``out_channels`` channels.
        """
        if self.kind == "conv1x1":
            mixed: Tensor = self.mix(joined)
            return mixed
        dim = channel_dim(self.ndim)
        maps = joined.unflatten(dim, (len(self.num_channels), self.num_channels[0]))
        if self.kind == "mean":
            average: Tensor = maps.mean(dim)
            return average
        # Channels go last for the linear layers: (n, m, c, h, w) -> (n, m, h, w, c).
        last = maps.movedim(dim + 1, -1)
        query, key = self.query(last.mean(dim, keepdim=True)), self.key(last)
        weights = ((query * key).sum(-1, keepdim=True) / key.shape[-1] ** 0.5).softmax(dim)
        mixture: Tensor = (weights * last).sum(dim)
        return mixture.movedim(-1, dim) if self.ndim == 4 else mixture

    @property
    def recipe(self) -> dict[str, Any]:
        """What rebuilds it."""
        return {"kind": self.kind, "num_channels": list(self.num_channels), "ndim": self.ndim}


class Column(nn.Module):
    """One client's part of one level: its adaptor, if the level has any below it, and its block.

    Args:
        adaptor: joins the maps of the level below; ``None`` at the lowest level.
        block: the client's block.
    """

    def __init__(self, adaptor: Adaptor | None, block: nn.Module) -> None:
        super().__init__()
        self.adaptor, self.block = adaptor, block

    def forward(self, x: Tensor) -> Tensor:
        """Run adaptor and block.

        Args:
            x: the network's input at the lowest level, else the joined maps of the level below.

        Returns:
            The column's map.
        """
        mapped: Tensor = self.block(x if self.adaptor is None else self.adaptor(x))
        return mapped


class Level(nn.Module):
    """The columns of one level, side by side.

    Args:
        columns: in client-id order.
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        super().__init__()
        self.columns = nn.ModuleList(columns)

    def forward(self, x: Tensor) -> Tensor:
        """Run all columns on the same input.

        Args:
            x: the input of every column.

        Returns:
            Their maps, concatenated over channels.

        Raises:
            ModelError: the maps differ in more than their channels.
        """
        maps = self._side_by_side(x) if self._is_plain(x) else [column(x) for column in self.columns]
        check_side_by_side([m.shape[1:] for m in maps])
        return torch.cat(maps, channel_dim(maps[0].ndim)) if len(maps) > 1 else maps[0]

    def _is_plain(self, x: Tensor) -> bool:
        """Whether only the outputs count: no gradient, no batch statistics, nobody who traces or looks inside."""
        if self.training or torch.is_grad_enabled() or len(self.columns) < 2 or x.ndim != 4:
            return False
        if x.dtype != torch.float32 or torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
            return False
        return not any(m.training or m._forward_hooks or m._forward_pre_hooks for m in self.modules())

    def _side_by_side(self, x: Tensor) -> list[Tensor]:
        """The columns' maps, each one apart or all joined in one.

        Nothing is kept from one call to the next, so that no change of the weights can be missed; to join the weights
        costs little beside a batch of inputs.
        """
        columns = _columns(self)
        blocks = [column.block for column in columns]
        inputs = _inputs([column.adaptor for column in columns], x)
        one, is_shared = inputs[0], len(inputs) == 1
        way = fastest_way(blocks, one) if all(i.shape == one.shape for i in inputs) else "plain"
        if way == "joined":
            together = parallel(blocks, ndim=one.ndim, shared=is_shared)
            if together is not None:
                return [together(one if is_shared else torch.cat(inputs, channel_dim(one.ndim)))]
        runs: list[Callable[[Tensor], Tensor]] = list(blocks)
        if way != "plain":
            runs = [parallel([block], ndim=one.ndim, shared=True) or block for block in blocks]
        return [run(i) for run, i in zip(runs, inputs * (len(blocks) if is_shared else 1), strict=True)]


class FusedBlocks(nn.Module):
    """Levels of parallel columns and, once there is one, a linear head on the mean or the join of their features.

    Args:
        levels: from the input upwards.
        features: ``mean`` or ``concat``: what the head sees of the last level's features.
        head: maps features to logits; ``None`` gives the features themselves.
        block_recipes: per level and column, what rebuilds the block.
    """

    def __init__(
        self,
        levels: Sequence[Level],
        *,
        features: str = "concat",
        head: nn.Linear | None = None,
        block_recipes: Sequence[Sequence[Recipe]] = (),
    ) -> None:
        super().__init__()
        if features not in FEATURES:
            raise ModelError(f'there are no features "{features}"', fix=f"use one of {', '.join(FEATURES)}")
        self.levels, self.features, self.head = nn.ModuleList(levels), features, head
        self.block_recipes = [list(level) for level in block_recipes]

    def forward(self, x: Tensor) -> Tensor:
        """Run all levels and the head.

        Args:
            x: inputs, shape ``(n, *input_shape)``.

        Returns:
            Logits ``(n, num_classes)``; without a head the features ``(n, d)``.
        """
        for level in self.levels:
            x = level(x)
        last: Any = self.levels[-1]
        if self.features == "mean" and len(last.columns) > 1:
            if x.shape[1] % len(last.columns):
                raise ModelError("features of different widths cannot be averaged", fix="use features: concat")
            x = x.unflatten(1, (len(last.columns), -1)).mean(1)
        return x if self.head is None else self.head(x)

    @property
    def recipe(self) -> dict[str, Any]:
        """What rebuilds the network."""
        levels = [
            [
                {
                    "adaptor": None if c.adaptor is None else c.adaptor.recipe,
                    "out_channels": _out(c.adaptor),
                    "block": recipe,
                }
                for c, recipe in zip(_columns(level), recipes, strict=True)
            ]
            for level, recipes in zip(self.levels, self.block_recipes, strict=True)
        ]
        head = None if self.head is None else [self.head.in_features, self.head.out_features]
        return {"kind": "fused_blocks", "features": self.features, "head": head, "levels": levels}


def _columns(level: nn.Module) -> list[Column]:
    assert isinstance(level, Level)
    return [column for column in level.columns if isinstance(column, Column)]


def _inputs(adaptors: Sequence[Adaptor | None], x: Tensor) -> list[Tensor]:
    """What the adaptors make of their common input: one tensor where it is the same for all columns."""
    given = [adaptor for adaptor in adaptors if adaptor is not None]
    kinds = {(adaptor.kind, adaptor.num_channels, adaptor.ndim) for adaptor in given}
    if not given:
        return [x]
    if len(given) < len(adaptors) or len(kinds) > 1 or given[0].kind == "attention":
        return [x if adaptor is None else adaptor(x) for adaptor in adaptors]
    if given[0].kind == "mean":
        return [given[0](x)]
    # All 1x1 convolutions read the same maps: they are one convolution.
    mixes: list[Any] = [adaptor.mix for adaptor in given]
    weight, bias = torch.cat([m.weight for m in mixes]), torch.cat([m.bias for m in mixes])
    mixed = F.conv2d(x, weight, bias) if given[0].ndim == 4 else F.linear(x, weight, bias)
    return list(mixed.split([len(m.weight) for m in mixes], channel_dim(x.ndim)))


def _out(adaptor: Adaptor | None) -> int:
    if adaptor is None:
        return 0
    mix = getattr(adaptor, "mix", None)
    if mix is None:
        return adaptor.num_channels[0]
    return int(mix.out_channels if isinstance(mix, nn.Conv2d) else mix.out_features)


@register_recipe("fused_blocks")
def build_fused_blocks(recipe: Mapping[str, Any]) -> FusedBlocks:
    """Build a network of parallel columns.

    Args:
        recipe: what :attr:`FusedBlocks.recipe` gave.

    Returns:
        The network with fresh weights.
    """
    levels, block_recipes = [], []
    for level in recipe["levels"]:
        columns = []
        for entry in level:
            facts = entry["adaptor"]
            adaptor = facts and Adaptor(facts["kind"], facts["num_channels"], entry["out_channels"], facts["ndim"])
            columns.append(Column(adaptor or None, build(entry["block"])))
        levels.append(Level(columns))
        block_recipes.append([entry["block"] for entry in level])
    head = nn.Linear(*recipe["head"]) if recipe["head"] else None
    return FusedBlocks(levels, features=recipe["features"], head=head, block_recipes=block_recipes)
