"""The advice to the allocator changes speed, never results."""

from __future__ import annotations

import ctypes

import pytest
import torch

from fedfuse.training import memory


def test_results_are_the_same_after_the_advice() -> None:
    x = torch.randn(64, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    w = torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(1))
    before = torch.conv2d(x, w)
    memory.keep_freed_memory()
    assert torch.equal(torch.conv2d(x, w), before)


def test_elsewhere_than_on_linux_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", "darwin")
    assert memory.keep_freed_memory() is False


def test_a_library_without_the_call_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert memory.keep_freed_memory() is False
