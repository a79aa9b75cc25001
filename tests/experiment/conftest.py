"""A configuration so small that a run takes a fraction of a second."""

from __future__ import annotations

from typing import Any

import pytest


@pytest.fixture
def config() -> dict[str, Any]:
    """Handwritten digits, three clients, a small perceptron, two epochs."""
    return {
        "seed": 2,
        "data": {
            "source": "digits",
            "limit": 200,
            "test_limit": 80,
            "partition": {"scheme": "dirichlet", "num_clients": 3, "dirichlet_alpha": 0.5},
        },
        "model": {"family": "mlp", "width": 8, "depth": 2},
        "method": {"name": "fusefl", "num_blocks": 2, "local": {"num_epochs": 2, "batch_size": 32}},
        "runtime": {"name": "local", "workers": 1},
        "server": {"threads": 1},
    }
