from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No test touches the user's cache, and none sees another's."""
    monkeypatch.setenv("FEDFUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def png() -> Callable[..., bytes]:
    """Encode pixels, shape (height, width) or (height, width, 3), as PNG."""
    image_module = pytest.importorskip("PIL.Image")

    def encode(pixels: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        image_module.fromarray(np.asarray(pixels)).save(buffer, format="PNG")
        return buffer.getvalue()

    return encode


@pytest.fixture(scope="session")
def shared_data() -> Path:
    if not SHARED.is_dir():
        pytest.skip("the shared data sets are not beside the repository")
    return SHARED
