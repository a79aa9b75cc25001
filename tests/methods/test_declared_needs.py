"""What methods say of themselves, for the adviser: it must agree with what they do."""

from __future__ import annotations

import inspect

import pytest

from fedfuse.core.registry import METHODS
from fedfuse.experiment.watching import WatchedJob


@pytest.mark.parametrize("name", METHODS.names())
def test_a_method_that_refuses_different_models_says_so(name: str) -> None:
    method = METHODS.get(name)
    classes = [cls for cls in method.__mro__ if cls.__module__.startswith("fedfuse.methods")]
    refuses = any("check_homogeneous(" in inspect.getsource(cls) for cls in classes)
    assert method.takes_heterogeneous is not refuses, "set takes_heterogeneous: ClassVar[bool] in the class"


def test_a_look_at_the_server_s_data_is_remembered() -> None:
    import torch

    from fedfuse.core.examples import Examples
    from fedfuse.core.seeding import Rng

    own = Examples(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))
    model: object = None
    jobs = [
        WatchedJob(model=model, rng=Rng(0), device=torch.device("cpu"), server_data=data)  # type: ignore[arg-type]
        for data in (own, own, None)
    ]
    assert jobs[0].server_data is own
    assert jobs[2].server_data is None
    assert [job.used_server_data for job in jobs] == [True, False, False]
