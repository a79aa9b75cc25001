from __future__ import annotations

import pytest

from fedfuse.core.errors import ConfigError, DataError
from fedfuse.data.checks import check_at_least, check_fraction, check_limit, check_positive, optional_module


def test_messages_name_the_setting() -> None:
    with pytest.raises(ConfigError) as error:
        check_at_least("partition.num_clients", 0, 1)
    assert str(error.value) == (
        "num_clients must be at least 1, not 0\n  where: partition.num_clients\n  fix:   set num_clients to 1 or more"
    )
    with pytest.raises(ConfigError, match=r"test_fraction must be in \[0, 1\), not 1\.0"):
        check_fraction("source.test_fraction", 1.0)
    with pytest.raises(ConfigError, match="limit must be at least 1, not -3"):
        check_limit("limit", -3)
    check_limit("limit", None)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_positive_numbers_are_finite(value: float) -> None:
    with pytest.raises(ConfigError, match="dirichlet_alpha must be above 0"):
        check_positive("partition.dirichlet_alpha", value)


def test_a_missing_package_names_the_extra() -> None:
    with pytest.raises(DataError) as error:
        optional_module("no_such_package_at_all.part", package="no-such-package", extra="data")
    assert str(error.value) == 'no-such-package is not installed\n  fix:   pip install "fedfuse[data]"'
