"""Clients that lack classes, own one example, or name and measure things in their own way: every method copes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedfuse
from fedfuse.core.errors import FedfuseError
from fedfuse.methods.fusefl import FuseFL
from fedfuse.training import LocalSGD

# The methods that every comparison begins with; the others are asked the same by the conformance tests.
METHODS = ["centralized", "ensemble", "feature_ensemble", "fedavg", "fedprox", "fusefl", "local"]
LOCAL: dict[str, Any] = {"num_epochs": 2, "batch_size": 8}


def _model() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def _images(labels: list[Any], side: int = 4, seed: int = 0) -> list[tuple[torch.Tensor, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [(torch.rand((1, side, side), generator=generator), label) for label in labels]


def _run(clients: Any, method: str, **settings: Any) -> fedfuse.Result:
    made: Any = method
    if method == "fusefl":
        made = FuseFL(num_blocks=2, local=LocalSGD(**LOCAL))
    elif method != "centralized":
        made = fedfuse.core.registry.METHODS.get(method)(local=LocalSGD(**LOCAL))
    runtime = {"name": "local", "workers": 1}
    return fedfuse.run(model=_model, clients=clients, method=made, runtime=runtime, **settings)


@pytest.mark.parametrize("method", METHODS)
def test_a_client_with_one_example_beside_one_that_lacks_classes(method: str) -> None:
    clients = {"lacks": _images([0, 1] * 4), "one": _images([2], seed=1)}
    result = _run(clients, method, test=_images([0, 1, 2] * 3, seed=2))
    assert result.accuracy is not None
    assert 0 <= result.accuracy <= 1
    assert result.clients["one"]["num_examples"] == 1
    assert result.clients["lacks"]["label_counts"] == [4, 4, 0]
    assert result.missing == {}


@pytest.mark.parametrize("method", METHODS)
def test_label_sets_and_sizes_that_differ_are_mapped(method: str) -> None:
    clients = {
        "clinic": _images(["healthy", "ill"] * 3, side=8),
        "hospital": _images([10, 20, 30] * 2, seed=1),
    }
    result = _run(
        clients,
        method,
        test=_images(["well", "ill", "unsure"], side=5, seed=2),
        class_names=["well", "ill", "unsure"],
        labels={"healthy": "well", "hospital": {"10": "well", "20": "ill", "30": "unsure"}},
        resize=4,
    )
    assert result.facts["class_names"] == ["well", "ill", "unsure"]
    assert result.clients["clinic"]["label_counts"] == [3, 3, 0]
    assert result.clients["hospital"]["label_counts"] == [2, 2, 2]


def _refused(**settings: Any) -> str:
    with pytest.raises(FedfuseError) as error:
        fedfuse.run(model=_model, method="fedavg", **settings)
    return str(error.value)


def test_what_is_not_mapped_is_one_clear_error() -> None:
    sizes = {"a": _images([0, 1]), "b": _images([0, 1], side=8)}
    assert _refused(clients=sizes) == (
        "inputs have shape (1, 8, 8) here and (1, 4, 4) at a\n"
        "  where: b\n"
        "  fix:   bring the inputs of all clients to one shape; resize=28 brings all images to 28 x 28 pixels"
    )
    names = {"a": _images(["cat", "dog"]), "b": _images(["Katze", "dog"])}
    assert _refused(clients=names, class_names=["cat", "dog"]) == (
        'the label "Katze" is none of the 2 classes: cat, dog\n'
        "  where: b\n"
        "  fix:   name its class in labels={own name: common name}, or add it to class_names"
    )
    assert _refused(clients={"a": _images(["cat", "dog"])}).splitlines()[0] == (
        "the label of example 0 is not a whole number: 'cat'"
    )
    test = _images(["cat", "lynx"])
    assert _refused(clients={"a": _images(["cat", "dog"])}, test=test, class_names=["cat", "dog"]).splitlines()[:2] == [
        'the label "lynx" is none of the 2 classes: cat, dog',
        "  where: test",
    ]


def test_settings_for_data_of_one_s_own_are_refused_beside_a_configuration(config: dict[str, Any]) -> None:
    with pytest.raises(FedfuseError) as error:
        fedfuse.run(config, resize=8)
    assert str(error.value) == (
        "class_names, labels and resize are for data of one's own\n"
        "  where: fedfuse.run\n"
        "  fix:   set data.labels and data.resize in the configuration"
    )


def test_a_configuration_merges_classes_and_resizes(config: dict[str, Any]) -> None:
    parity = {str(digit): "even" if digit % 2 == 0 else "odd" for digit in range(10)}
    config["data"].update(labels=parity, resize=4)
    config["method"] = {"name": "ensemble", "local": LOCAL}
    result = fedfuse.run(config)
    assert result.facts["class_names"] == ["even", "odd"]
    assert result.artifact is not None
    assert result.artifact.info["input_shape"] == [1, 4, 4]
    assert result.facts["config"]["data"]["labels"] == parity


# --- data of the server's own


class Seen:
    """What a method gets to see of the server's data."""

    data: Any = None


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> type[Seen]:
    """Watches the ensemble's job."""
    from fedfuse.methods.ensemble import EnsembleMethod

    original = EnsembleMethod.fuse

    def watched(self: Any, cohort: Any, job: Any) -> Any:
        Seen.data = job.server_data
        return original(self, cohort, job)

    Seen.data = None
    monkeypatch.setattr(EnsembleMethod, "fuse", watched)
    return Seen


def test_a_method_gets_what_the_configuration_holds_out(config: dict[str, Any], seen: type[Seen]) -> None:
    config["method"] = {"name": "ensemble", "local": LOCAL}
    plain = fedfuse.run(config)
    assert seen.data is None
    config["data"]["server"] = {"fraction": 0.1}
    result = fedfuse.run(config)
    data: Any = seen.data
    assert tuple(data.x.shape) == (20, 1, 8, 8)
    assert data.y.tolist() == [-1] * 20
    # The watcher of this test looked at them, as a method would.
    assert result.facts["used_server_data"] is True
    assert plain.facts["used_server_data"] is False
    assert result.facts["config"]["data"]["server"] == {"fraction": 0.1, "num_examples": None, "labelled": False}

    def held(run: fedfuse.Result) -> int:
        return sum(sum(client["label_counts"]) for client in run.clients.values())

    assert (held(plain), held(result)) == (200, 180)
    again = fedfuse.run(result.facts["config"])
    assert again.facts["artifact"]["digest"] == result.facts["artifact"]["digest"]


def test_another_source_may_be_the_server_s(config: dict[str, Any], seen: type[Seen], tmp_path: Any) -> None:
    config["method"] = {"name": "ensemble", "local": LOCAL}
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "own.npz", x=rng.random((30, 1, 8, 8), dtype=np.float32), y=np.arange(30) % 3)
    config["data"]["server"] = {"source": "npz", "path": str(tmp_path / "own.npz"), "limit": 12, "labelled": True}
    result = fedfuse.run(config)
    data: Any = seen.data
    assert (len(data), data.y.tolist()) == (12, [i % 3 for i in range(12)])
    assert result.facts["config"]["data"]["server"]["limit"] == 12


def test_a_program_s_own_server_data_and_a_test_row_in_it(config: dict[str, Any], seen: type[Seen]) -> None:
    config["method"] = {"name": "ensemble", "local": LOCAL}
    result = fedfuse.run(config, server_data=torch.rand(5, 1, 8, 8))
    assert len(seen.data) == 5
    assert result.facts["config"]["data"]["server"] == {"source": "own", "labelled": False}
    with pytest.raises(FedfuseError, match="this run had server data of a program's own"):
        fedfuse.run(result.facts["config"])
    from fedfuse.data.sources.digits import Digits

    test = Digits().load(test_limit=80).test
    assert test is not None
    with pytest.raises(FedfuseError) as error:
        fedfuse.run(config, server_data=test.x[7:9])
    assert str(error.value).splitlines()[:2] == [
        "row 0 of the server's data is row 7 of the test part",
        "  where: data.server",
    ]
    own = fedfuse.run(model=_model, clients=[_images([0, 1, 2])], server_data=torch.rand(4, 1, 4, 4), method="ensemble")
    assert len(seen.data) == 4
    assert own.facts["config"]["data"]["server"] == {"source": "own"}


@pytest.mark.parametrize(
    ("server", "message"),
    [
        (
            {"source": "digits", "fraction": 0.1},
            (
                "the server's data has a source and the size of a part\n  where: data.server\n"
                "  fix:   give a source, or a part of the training data to hold out, not both"
            ),
        ),
        (
            {"fractoin": 0.1},
            (
                'unknown setting "fractoin"\n  where: data.server.fractoin\n'
                '  fix:   did you mean "fraction"? known: fraction, labelled, limit, num_examples, source'
            ),
        ),
        (
            {},
            (
                "the size of the server's part is missing\n  where: data.server\n"
                "  fix:   give either fraction: 0.1 or num_examples: 500"
            ),
        ),
    ],
)
def test_server_sections_that_cannot_be(config: dict[str, Any], server: dict[str, Any], message: str) -> None:
    config["data"]["server"] = server
    with pytest.raises(FedfuseError) as error:
        fedfuse.run(config)
    assert str(error.value) == message
