"""A user's own module and data sets, with no subclassing of ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

import fedfuse
from fedfuse.core.errors import ConfigError, DataError, FedfuseError, ModelError, RegistryError


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)
        self.norm = nn.BatchNorm1d(8)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.norm(self.first(x))))


class Rows(Dataset[Any]):
    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.x[index], int(self.y[index])


def part(seed: int, n: int = 40) -> tuple[Tensor, Tensor]:
    y = torch.arange(n) % 3
    noise = torch.randn(n, 6, generator=torch.Generator().manual_seed(seed))
    return noise + 2 * F.one_hot(y, 6), y


A, B, C, TEST = part(0), part(1), part(2), part(3, 60)
LOCAL = fedfuse.LocalSGD(num_epochs=2, batch_size=16)


@pytest.fixture
def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Own()


def digest(**settings: Any) -> str:
    settings.setdefault("method", fedfuse.FeatureEnsemble(local=LOCAL))
    return str(fedfuse.run(**settings).facts["artifact"]["digest"])


def test_every_kind_of_data_set_gives_the_same_run(model: nn.Module) -> None:
    datasets = pytest.importorskip("datasets")
    kinds = {
        "pairs of tensors": [A, B, C],
        "own Dataset": [Rows(*A), Rows(*B), Rows(*C)],
        "TensorDataset": [TensorDataset(*A), TensorDataset(*B), TensorDataset(*C)],
        "arrays": [(x.numpy(), y.numpy()) for x, y in (A, B, C)],
        "Hugging Face": [
            datasets.Dataset.from_dict({"x": x.tolist(), "label": y.tolist()}).cast_column(
                "x", datasets.Sequence(datasets.Value("float32"))
            )
            for x, y in (A, B, C)
        ],
        "mixed": [A, Rows(*B), TensorDataset(*C)],
    }
    digests = {name: digest(model=model, clients=clients) for name, clients in kinds.items()}
    assert len(set(digests.values())) == 1, digests


def test_the_order_in_which_clients_are_given_changes_nothing(model: nn.Module) -> None:
    assert digest(model=model, clients={"c": C, "a": A, "b": B}) == digest(
        model=model, clients={"a": A, "b": B, "c": C}
    )
    assert digest(model=model, clients={"a": B, "b": A, "c": C}) != digest(
        model=model, clients={"a": A, "b": B, "c": C}
    )


def test_a_list_names_clients_by_position(model: nn.Module) -> None:
    named = digest(model=model, clients={f"client_{i}": p for i, p in enumerate((A, B, C))})
    assert digest(model=model, clients=[A, B, C]) == named


@pytest.mark.parametrize(
    "method",
    [
        fedfuse.FuseFL(num_blocks=2, local=LOCAL),
        fedfuse.FedAvg(local=LOCAL, num_rounds=2),
        fedfuse.EnsembleMethod(local=LOCAL),
        fedfuse.FeatureEnsemble(local=LOCAL),
        fedfuse.Centralized(local=LOCAL),
    ],
    ids=lambda m: m.name,
)
def test_every_method_takes_it_and_the_artifact_works_alone(model: nn.Module, method: Any, tmp_path: Path) -> None:
    result = fedfuse.run(model=model, clients=[A, B, C], test=TEST, method=method, out=tmp_path / "run")
    assert result.accuracy > 1 / 3
    with torch.inference_mode():
        logits = result.module()(TEST[0])
        assert (logits.argmax(1) == TEST[1]).double().mean().item() == pytest.approx(result.accuracy)
        torch.testing.assert_close(fedfuse.load(tmp_path / "run")(TEST[0]), logits)


def test_without_a_test_set_there_is_no_accuracy(model: nn.Module) -> None:
    result = fedfuse.run(model=model, clients=[A, B], method=fedfuse.FuseFL(num_blocks=1, local=LOCAL))
    assert result.accuracy is None
    assert result.facts["loss"] is None
    assert result.facts["confusion"] is None
    assert all(client["accuracy_kind"] == "fused model on validation" for client in result.clients.values())
    assert result.folder is None


def test_separate_models_without_a_test_set(model: nn.Module) -> None:
    result = fedfuse.run(model=model, clients=[A, B], method=fedfuse.Local(local=LOCAL))
    assert result.accuracy is None
    assert sorted(result.personal) == ["client_0", "client_1"]


def test_everyone_starts_from_the_weights_of_the_given_module(model: nn.Module) -> None:
    slow = fedfuse.LocalSGD(num_epochs=1, batch_size=64, learning_rate=1e-9, momentum=0.0)
    result = fedfuse.run(model=model, clients=[A, B], method=fedfuse.FedAvg(local=slow))
    found = result.module().state_dict()
    assert sorted(found) == sorted(model.state_dict())
    torch.testing.assert_close(found["first.weight"], model.first.weight.detach(), rtol=0, atol=1e-6)
    assert int(found["norm.num_batches_tracked"]) == 1


def test_the_given_module_and_data_are_left_as_they_are(model: nn.Module) -> None:
    before = {name: t.clone() for name, t in model.state_dict().items()}
    x = A[0].clone()
    model.train()
    digest(model=model, clients=[A, B])
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(A[0], x)
    assert model.training


def test_a_class_or_function_makes_the_module_from_the_seed() -> None:
    assert digest(model=Own, clients=[A, B]) == digest(model=lambda: Own(), clients=[A, B])
    assert digest(model=Own, clients=[A, B]) != digest(model=Own, clients=[A, B], seed=1)


def test_two_workers_give_the_same_bits(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    method = fedfuse.FuseFL(num_blocks=2, local=LOCAL)
    alone = digest(model=model, clients=[A, B, C], method=method, runtime={"name": "local", "workers": 1})
    monkeypatch.setattr("fedfuse.runtimes.local._WORTH_IT_S", 0.0)
    assert digest(model=model, clients=[A, B, C], method=method, runtime={"name": "local", "workers": 2}) == alone


def test_images_with_their_channels_and_a_sequential(tmp_path: Path) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    )
    x = torch.rand(24, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    data = [(x, torch.arange(24) % 2), (x.flip(3), torch.arange(24) % 2)]
    result = fedfuse.run(model=net, clients=data, method=fedfuse.FuseFL(num_blocks=1, local=LOCAL), out=tmp_path)
    assert result.module()(x).shape == (24, 2)


def refused(kind: type[FedfuseError], **settings: Any) -> str:
    with pytest.raises(kind) as caught:
        fedfuse.run(**settings)
    return str(caught.value)


def test_what_cannot_be_run(model: nn.Module) -> None:
    nothing = "there is nothing to run\n  where: fedfuse.run\n  fix:   give a configuration, or model= and clients="
    assert refused(ConfigError) == nothing
    assert refused(ConfigError, model=model) == nothing
    assert refused(ConfigError, clients=[A]) == nothing
    assert refused(DataError, model=model, clients=[]) == (
        "there are no clients\n  where: clients\n  fix:   give one data set per client"
    )
    assert refused(RegistryError, model=model, clients=[A], method="fusfl").startswith(
        'there is no method "fusfl"\n  fix:   did you mean "fusefl"?'
    )
    assert refused(ConfigError, model=model, clients=[A], federation={"quorm": 1}) == (
        'unknown setting "quorm"\n  where: federation.quorm\n'
        '  fix:   did you mean "quorum"? known: clients, codec, late, max_upload_bytes, quorum, '
        "secure_aggregation, timeout_s"
    )
    assert refused(ModelError, model=3, clients=[A]).startswith("the model is a int\n  where: model\n")
    assert refused(ModelError, model=nn.Linear(5, 3), clients=[A]).startswith(
        "the model cannot take an input of shape (6,): "
    )
    assert "(3, 12)" in refused(ModelError, model=model, clients=[(A[0], A[1] + 9)])
    assert "training inputs have shape (6,) and test inputs (5,)" in refused(
        DataError, model=model, clients=[A], test=(TEST[0][:, :5], TEST[1])
    )
