"""The tasks that methods share: local training, its expectation, weights, and the moments of features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedfuse.core.artifact import detached_state
from fedfuse.core.cohort import Replies
from fedfuse.core.errors import DataError, FedfuseError, UploadRefused
from fedfuse.core.expecting import TensorSpec, check_upload
from fedfuse.core.journal import Entry
from fedfuse.core.payload import Payload
from fedfuse.methods.local import Local
from fedfuse.methods.tasks import (
    MODEL_UPLOADS,
    MOMENT_UPLOADS,
    client_artifact,
    example_weights,
    model_expectation,
    moments_expectation,
    moments_upload,
    read_moments,
)
from fedfuse.ops.moments import class_moments
from fedfuse.training import LocalSGD, train

ONCE = LocalSGD(num_epochs=1, batch_size=16)


def replies_of(*uploads: dict[str, Any]) -> Replies:
    entries = {f"client_{i}": Entry(f"{i}", {}, data=Payload(u).encode()) for i, u in enumerate(uploads)}
    return Replies(entries, {})


def test_an_upload_is_the_locally_trained_model_with_its_counts_and_curves(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fed.fuse(Local(local=LocalSGD(num_epochs=3, batch_size=16)))
    upload, data = fed.upload("local_models", "client_1"), fed.data["client_1"]
    assert upload["num_examples"] == 32
    assert upload.tensor("label_counts").tolist() == [int((data.train.y == c).sum()) for c in range(4)]
    assert list(upload.group("model")) == sorted(fed.spec.build().state_dict())
    assert sorted(upload.group("curve")) == ["train_loss", "validation_accuracy", "validation_loss"]
    assert all(len(curve) == 3 for curve in upload.group("curve").values())
    assert upload.tensor("curve/train_loss")[-1] < upload.tensor("curve/train_loss")[0]


def test_training_starts_from_the_weights_and_for_the_epochs_of_the_message(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1)
    start = {name: torch.full_like(t, 0.1) for name, t in fed.spec.build().state_dict().items()}
    fed.fuse(Local(local=ONCE))

    method = Local(local=LocalSGD(num_epochs=9, batch_size=16))
    message = Payload({"num_epochs": 2}).put_group("model", start)
    fed.fuse(method)
    fed.cohort.ask(method.train_local, message, key="again")
    upload = fed.upload("again", "client_0")
    assert len(upload.tensor("curve/train_loss")) == 2

    module = fed.spec.build()
    module.load_state_dict(start)
    data = fed.data["client_0"].train
    train(module, data, method.local, rng=fed.rng("client_0", "again"), device=torch.device("cpu"), num_epochs=2)
    assert all(torch.equal(t, upload.tensor(f"model/{name}")) for name, t in detached_state(module).items())


def test_what_was_sent_decides_the_answer_and_equal_questions_share_it(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1)
    method = Local(local=ONCE)
    fed.fuse(method)
    fed.fuse(method)
    assert [entry.from_journal for entry in fed.cohort.ledger.entries] == [True] * 3
    fed.cohort.ask(method.train_local, Payload({"num_epochs": 1}), key="other")
    assert len(fed.journal.entries()) == 6


def test_expectation_of_a_model_accepts_the_upload_and_names_what_is_wrong(federation: Any) -> None:
    fed = federation(width=4, depth=2)
    fed.fuse(Local(local=ONCE))
    upload, expect = fed.upload("local_models", "client_0"), model_expectation(fed.spec)

    def refused(changed: Payload) -> str:
        with pytest.raises(UploadRefused) as caught:
            check_upload("client_0", changed.encode(), MODEL_UPLOADS, expect, 1 << 30)
        return f"{caught.value.what} ({caught.value.where})"

    check_upload("client_0", upload.encode(), MODEL_UPLOADS, expect, 1 << 30)
    where = "client client_0, key 'label_counts'"
    short = Payload({**upload, "label_counts": torch.zeros(3, dtype=torch.int64)})
    assert refused(short) == f"the upload was refused: its shape is (3,), wanted (4,) ({where})"
    half = Payload({**upload, "label_counts": torch.zeros(4)})
    assert refused(half) == f"the upload was refused: its dtype is torch.float32, wanted torch.int64 ({where})"
    real = Payload({**upload, "num_examples": 24.0})
    assert refused(real) == "the upload was refused: it is a float, wanted a int (client client_0, key 'num_examples')"
    lacking = Payload({key: value for key, value in upload.items() if key != "model/0.weight"})
    assert refused(lacking) == "the upload was refused: the key is missing (client client_0, key 'model/0.weight')"


def test_weights_are_the_numbers_of_examples_in_client_order() -> None:
    assert example_weights(replies_of({"num_examples": 3}, {"num_examples": 5})) == [3.0, 5.0]


@pytest.mark.parametrize("count", [0, -4])
def test_a_client_that_claims_no_example_is_named(count: int) -> None:
    with pytest.raises(DataError) as caught:
        example_weights(replies_of({"num_examples": 3}, {"num_examples": count}))
    assert str(caught.value) == (
        f"it claims {count} training examples\n  where: client client_1\n  fix:   leave this client out"
    )


def test_the_artifact_of_a_client_is_its_own_architecture(federation: Any) -> None:
    fed = federation(client_models={"client_2": ("mlp", {"width": 5, "depth": 1})}, width=4, depth=2)
    fed.fuse(Local(local=ONCE))
    kinds = [
        client_artifact(fed.job, c, fed.upload("local_models", c)).recipe["family"] for c in ("client_0", "client_2")
    ]
    assert kinds == ["cnn", "mlp"]


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


@pytest.mark.parametrize("per_class", [False, True])
def test_moments_survive_the_upload(federation: Any, per_class: bool) -> None:
    fed = federation("mlp", input_shape=(5,), width=4, depth=1)
    client = type("Client", (), {"data": fed.data["client_0"], "device": torch.device("cpu")})()
    upload = moments_upload(Doubled(), client, per_class=per_class)
    expect = moments_expectation(4, 5, per_class=per_class)
    check_upload("client_0", upload.encode(), MOMENT_UPLOADS, expect, 1 << 30)
    assert {key: spec.shape for key, spec in expect.items() if isinstance(spec, TensorSpec)} == {
        "moments/counts": (4,),
        "moments/means": (4, 5),
        "moments/scatter": (4, 15) if per_class else (15,),
    }
    data = fed.data["client_0"].train
    wanted, found = class_moments(2 * data.x, data.y, 4, per_class=per_class), read_moments(upload)
    assert torch.equal(found.counts, wanted.counts)
    torch.testing.assert_close(found.means, wanted.means, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.scatter, wanted.scatter, rtol=1e-6, atol=1e-4)


def test_moments_of_the_training_part_only(federation: Any) -> None:
    fed = federation("mlp", input_shape=(5,), width=4, depth=1)
    client = type("Client", (), {"data": fed.data["client_1"], "device": torch.device("cpu")})()
    assert moments_upload(Doubled(), client, per_class=False).tensor("moments/counts").sum() == 32


def test_a_client_that_diverges_says_so_and_costs_only_itself(federation: Any) -> None:
    fed = federation("mlp", width=4, depth=1)
    with pytest.raises(FedfuseError) as caught:
        fed.fuse(Local(local=LocalSGD(num_epochs=2, batch_size=16, learning_rate=1e30)))
    assert '0 of 3 clients answered the exchange "local_models", 3 are needed' in caught.value.what
    assert "training diverged: the loss is" in caught.value.what
