"""What smaller models hold of a larger one."""

from __future__ import annotations

import pytest
from torch import nn

from fedfuse.core.artifact import ModelSpec
from fedfuse.core.errors import ModelError
from fedfuse.models import spec
from fedfuse.models.nesting import Nest, nest_of, packed_axes, shapes_of

BERT = {"model_type": "bert", "vocab_size": 40, "intermediate_size": 24, "num_attention_heads": 2}


def bert(width: int, depth: int) -> ModelSpec:
    config = {**BERT, "hidden_size": width, "num_hidden_layers": depth}
    return spec("transformers", {"config": config}, input_shape=(6,), num_classes=3, seed=1)


def test_transformers_are_nested_by_width_and_by_depth() -> None:
    nest = nest_of([bert(8, 1), bert(8, 2), bert(12, 3)])
    small = bert(8, 1)
    part = nest.part(nest.spec.build().state_dict(), shapes_of(small.build()))
    assert part["net.encoder.layer.0.attention.self.query.weight"].shape == (8, 8)
    assert sorted(part) == sorted(small.build().state_dict())
    assert not any("layer.1." in name for name in part)


def test_a_wider_but_shallower_model_is_no_part() -> None:
    with pytest.raises(ModelError, match=r'is no part of the largest one: "net\.embeddings.word_embeddings\.weight"'):
        nest_of([bert(12, 1), bert(8, 9)])


def test_joined_weights_are_found() -> None:
    both = nn.Sequential(nn.MultiheadAttention(4, 2), nn.Linear(4, 4))
    assert packed_axes(both) == {"0.in_proj_weight": {0: 3}, "0.in_proj_bias": {0: 3}}
    gpt2 = {"model_type": "gpt2", "vocab_size": 40, "n_embd": 8, "n_layer": 1, "n_head": 2}
    model = spec("transformers", {"config": gpt2}, input_shape=(6,), num_classes=3, seed=1)
    assert packed_axes(model.build()) == {
        "net.h.0.attn.c_attn.weight": {1: 3},
        "net.h.0.attn.c_attn.bias": {0: 3},
    }
    assert Nest.of(model).misfit({"net.h.0.attn.c_attn.bias": (12,)}) == ""
    assert Nest.of(model).misfit({"net.h.0.attn.c_attn.bias": (10,)}) == (
        '"net.h.0.attn.c_attn.bias" of shape (10,), in the largest (24,)'
    )
