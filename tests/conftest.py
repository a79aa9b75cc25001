"""What all tests share: one torch thread, reproducible hypothesis, pictures without a screen."""

from __future__ import annotations

import os
from pathlib import Path

# Before matplotlib or a hub client is imported anywhere.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import hypothesis
import pytest
import torch

# One thread per process: their number changes bits, and tests run in several processes.
torch.set_num_threads(1)

# Derandomised: a property that fails here fails everywhere. HYPOTHESIS_PROFILE=search looks for new counterexamples.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.register_profile("search", deadline=None, max_examples=2000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def shared_data(repository: Path) -> Path:
    """Folder of real data beside the checkout; tests that need it are skipped where it is missing."""
    folder = repository.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("needs the data sets in ../shared/data")
    return folder
