"""Weights in eight bits."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedfuse.core.payload import Payload
from fedfuse.ops.quantize import from_int8, pack_int8, to_int8, unpack_int8


def test_codes_and_scales_by_hand() -> None:
    codes, scales = to_int8(torch.tensor([[2.54, 1.27], [0.0, 0.0], [-1.27, 0.006]]))
    assert codes.tolist() == [[127, 64], [0, 0], [-127, 1]]
    torch.testing.assert_close(scales, torch.tensor([0.02, 0.0, 0.01]))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.floats(1e-6, 1e6))
def test_no_weight_is_off_by_more_than_half_a_scale(seed: int, size: float) -> None:
    weights = size * torch.randn(4, 3, 2, 2, generator=torch.Generator().manual_seed(seed))
    codes, scales = to_int8(weights)
    error = (from_int8(codes, scales) - weights).abs()
    assert codes.dtype == torch.int8
    assert bool((error <= 0.5 * scales[:, None, None, None] * (1 + 1e-4)).all())


def test_a_state_dict_keeps_its_biases_and_buffers_and_travels() -> None:
    state = {
        "w": torch.randn(8, 4),
        "bias": torch.randn(8),
        "counter": torch.tensor(3),
        "ids": torch.zeros(2, 2, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
    }
    tensors, scales = pack_int8(state)
    assert sorted(scales) == ["w"]
    payload = Payload.decode(Payload().put_group("t", tensors).put_group("s", scales).encode())
    back = unpack_int8(payload.group("t"), payload.group("s"))
    assert all(torch.equal(back[name], state[name]) for name in ("bias", "counter", "ids", "empty"))
    assert back["w"].dtype == torch.float32
    assert float((back["w"] - state["w"]).abs().max()) < 0.02
