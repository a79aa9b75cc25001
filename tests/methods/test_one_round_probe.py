"""The probe on quadratic losses, where every number is known by hand, and on the federation of images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fedfuse.analysis.one_round import diagnosis_of
from fedfuse.core.artifact import ModelSpec
from fedfuse.core.client import ClientSide
from fedfuse.core.cohort import Cohort
from fedfuse.core.errors import ConfigError, DataError
from fedfuse.core.examples import ClientData, Examples
from fedfuse.core.journal import Journal
from fedfuse.core.judging import Evaluation
from fedfuse.core.method import Fused, Job, Method
from fedfuse.core.payload import Payload
from fedfuse.core.seeding import Rng
from fedfuse.methods.fedavg import FedAvg
from fedfuse.methods.one_round_facts import base_updates, line_points, point_between, update_products
from fedfuse.methods.one_round_probe import OneRoundProbe
from fedfuse.runtimes.local import LocalRuntime
from fedfuse.training import LocalSGD

START = torch.tensor([3.0, 4.0], dtype=torch.float64)
CENTERS = torch.tensor([[1.0, 2.0], [3.0, -1.0]], dtype=torch.float64)
HESSIANS = torch.tensor([[1.0, 3.0], [2.0, 1.0]], dtype=torch.float64)


class Bowl(nn.Module):
    """``1/2 (w - x)' H_y (w - x)``: a client's label says which Hessian it has, its inputs say where the bottom is."""

    hessians: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(START.clone())
        self.register_buffer("hessians", HESSIANS.clone())

    def forward(self, x: Tensor) -> Tensor:
        return x.new_zeros(len(x), 2)

    def objective(self, x: Tensor, y: Tensor) -> Tensor:
        return 0.5 * (self.hessians[y] * (self.w - x) ** 2).sum(1).mean()

    def judge(self, examples: Examples, *, device: Any = "cpu") -> Evaluation:
        return Evaluation(0.0, float(self.objective(examples.x, examples.y)))


class Bowls:
    """Two clients with four equal examples and two equal validation examples each."""

    def __init__(self, num_clients: int = 2, num_validation: int = 2) -> None:
        self.spec = ModelSpec({}, seed=0, input_shape=(2,), num_classes=2, template=Bowl())

        def part(n: int, client: int) -> Examples:
            return Examples(CENTERS[client].repeat(n, 1), torch.full((n,), client))

        sides = {
            f"c{k}": ClientSide(f"c{k}", ClientData(part(4, k), part(num_validation, k), 2), self.spec)
            for k in range(num_clients)
        }
        self.runtime, self.journal = LocalRuntime(sides, workers=1), Journal()

    def fuse(self, method: Method) -> tuple[Fused, Job, Cohort]:
        job = Job(model=self.spec, rng=Rng(1), device=torch.device("cpu"))
        cohort = Cohort(runtime=self.runtime, method=method, model_of=job.model_of, seed=3, journal=self.journal)
        return method.fuse(cohort, job), job, cohort


def sgd(num_epochs: int, learning_rate: float) -> LocalSGD:
    return LocalSGD(num_epochs=num_epochs, batch_size=4, learning_rate=learning_rate, momentum=0.0)


def pooled_loss(w: Tensor) -> float:
    return float((0.5 * (HESSIANS * (w - CENTERS) ** 2).sum(1)).mean())


def test_every_measurement_on_quadratics_by_hand() -> None:
    probe = OneRoundProbe(local=sgd(4, 0.1), num_points=3, num_iterations=200)
    fused, job, _ = Bowls().fuse(probe)
    facts = job.facts["one_round"]
    # Gradient descent on a quadratic: each axis keeps (1 - 0.1 h)^4 of its distance to the bottom.
    updates = (1 - (1 - 0.1 * HESSIANS) ** 4) * (CENTERS - START)
    mean = updates.mean(0)
    assert fused.model is not None
    torch.testing.assert_close(fused.model.state["w"], START + mean)
    assert facts["clients"] == ["c0", "c1"]
    assert facts["shares"] == [0.5, 0.5]
    assert (facts["num_parameters"], facts["start_length"]) == (2, 5.0)
    assert facts["update_lengths"] == pytest.approx(updates.norm(dim=1).tolist())
    assert facts["mean_length"] == pytest.approx(float(mean.norm()))
    assert facts["spread_lengths"] == pytest.approx((updates - mean).norm(dim=1).tolist())
    assert facts["cosines"][0][1] == pytest.approx(float(torch.cosine_similarity(updates[0], updates[1], dim=0)))
    assert facts["num_steps"] == [4, 4]
    assert facts["path_lengths"] == pytest.approx([0.4, 0.4])
    assert facts["curvatures"] == pytest.approx([3.0, 2.0], rel=0.02)
    assert facts["have_settled"] == [True, True]
    slopes = HESSIANS * (START - CENTERS)
    assert facts["slopes_at_start"] == pytest.approx(slopes.norm(dim=1).tolist())
    assert facts["slopes_at_own"] == pytest.approx((slopes + HESSIANS * updates).norm(dim=1).tolist())
    assert facts["slopes_at_mean"] == pytest.approx((slopes + HESSIANS * mean).norm(dim=1).tolist())
    assert facts["changes_to_start"] == pytest.approx((HESSIANS * updates).norm(dim=1).tolist())
    changes = HESSIANS * (updates - mean)
    assert facts["changes_to_mean"] == pytest.approx(changes.norm(dim=1).tolist())
    # Two numbers rarely meet in one of 1024 places, so these sketches are exact.
    downhill = (slopes + HESSIANS * mean).mean(0)
    assert facts["pooled_change"] == pytest.approx(float(changes.mean(0).norm()), rel=1e-5)
    assert facts["pooled_slope"] == pytest.approx(float(downhill.norm()), rel=1e-5)
    assert facts["pooled_product"] == pytest.approx(float(changes.mean(0) @ downhill), rel=1e-5)
    assert facts["num_validation"] == 4
    first, second = facts["lines"]
    assert (first["from"], first["to"], first["places"]) == ("start", "mean", [0.0, 0.5, 1.0])
    assert first["losses"] == pytest.approx([pooled_loss(START + u * mean) for u in (0.0, 0.5, 1.0)])
    assert (second["from"], second["to"]) == ("c0", "c1")
    between = [pooled_loss(START + (1 - u) * updates[0] + u * updates[1]) for u in (0.0, 0.5, 1.0)]
    assert second["losses"] == pytest.approx(between)


@pytest.mark.parametrize("num_rounds", [2, 10])
def test_the_predicted_distance_is_right_where_training_is_short(num_rounds: int) -> None:
    bowls, local = Bowls(), sgd(20, 0.002)
    one, job, _ = bowls.fuse(OneRoundProbe(local=local))
    many, _, _ = bowls.fuse(FedAvg(local=local, num_rounds=num_rounds))
    assert one.model is not None
    assert many.model is not None
    measured = float((one.model.state["w"] - many.model.state["w"]).norm())
    predicted = diagnosis_of([job.facts["one_round"]], num_rounds).predicted_distance
    assert predicted == pytest.approx(measured, rel=0.05)


def test_it_asks_what_every_one_round_method_asks_and_gives_fedavg_s_model() -> None:
    bowls, local = Bowls(), sgd(4, 0.1)
    probed, _, cohort = bowls.fuse(OneRoundProbe(local=local))
    plain, _, again = bowls.fuse(FedAvg(local=local))
    assert cohort.ledger.exchanges() == ["local_models", "slopes", "lines"]
    assert all(entry.from_journal for entry in again.ledger.entries)
    assert probed.model is not None
    assert plain.model is not None
    assert torch.equal(probed.model.state["w"], plain.model.state["w"])


def test_many_examples_are_measured_batch_by_batch(federation: Any) -> None:
    from torch.nn import functional as F

    from fedfuse.core.artifact import load_state

    fed = federation(width=4, depth=1, norm="none", num_clients=1, num_examples=(150,))
    fed.fuse(OneRoundProbe(local=LocalSGD(num_epochs=1, batch_size=50)))
    module, data = fed.spec.build().eval(), fed.data["client_0"].train
    for place, state in (("start", {}), ("own", fed.upload("local_models", "client_0").group("model"))):
        load_state(module, {**module.state_dict(), **state})
        slopes = torch.autograd.grad(F.cross_entropy(module(data.x), data.y), list(module.parameters()))
        whole = sum(float(slope.double().square().sum()) for slope in slopes) ** 0.5
        assert fed.upload("slopes", "client_0").number(f"slope/{place}") == pytest.approx(whole, rel=1e-4)


def test_no_anchors_show_nobody_s_model(federation: Any) -> None:
    fed = federation(width=4, depth=1)
    fed.fuse(OneRoundProbe(local=LocalSGD(num_epochs=1, batch_size=16), num_anchors=0))
    sent = fed.message("lines", "client_0")
    assert {key.partition("/")[0] for key in sent} == {"points", "anchor_0"}
    assert [line["to"] for line in fed.job.facts["one_round"]["lines"]] == ["mean"]
    other = fed.upload("slopes", "client_0")
    assert sorted(key for key in other if not isinstance(other[key], Tensor)) == [
        "change/mean",
        "change/start",
        "curvature",
        "has_settled",
        "slope/mean",
        "slope/own",
        "slope/start",
    ]
    assert other.tensor("sketch/change").shape == (1024,)


def test_the_ends_of_the_lines_are_the_models_themselves(federation: Any) -> None:
    from fedfuse.core.artifact import load_state
    from fedfuse.training import evaluate

    fed = federation(width=4, depth=2)
    fed.fuse(OneRoundProbe(local=LocalSGD(num_epochs=2, batch_size=16), num_anchors=2, num_points=3))
    line = fed.job.facts["one_round"]["lines"][1]
    assert (line["from"], line["to"]) == ("client_0", "client_2")
    for client_id, loss in (("client_0", line["losses"][0]), ("client_2", line["losses"][-1])):
        module = fed.spec.build()
        load_state(module, fed.upload("local_models", client_id).group("model"))
        losses = [evaluate(module, data.validation).loss for data in fed.data.values()]
        assert loss == pytest.approx(sum(losses) / 3, rel=1e-5)


def test_one_client_is_measured_too() -> None:
    _, job, _ = Bowls(num_clients=1).fuse(OneRoundProbe(local=sgd(4, 0.1)))
    facts = job.facts["one_round"]
    assert facts["pooled_change"] == 0.0
    assert len(facts["lines"]) == 1
    assert diagnosis_of([facts], 10).verdict == "enough"


def test_a_missing_answer_costs_only_that_client(federation: Any) -> None:
    fed = federation(width=4, depth=1, absent=[("slopes", "client_1"), ("lines", "client_2")], quorum=0.6)
    fed.fuse(OneRoundProbe(local=LocalSGD(num_epochs=1, batch_size=16)))
    facts = fed.job.facts["one_round"]
    assert facts["clients"] == ["client_0", "client_2"]
    assert facts["shares"] == pytest.approx([24 / 64, 40 / 64])
    assert facts["num_validation"] == 16


def test_no_validation_examples_are_a_clear_error() -> None:
    with pytest.raises(DataError) as caught:
        Bowls(num_validation=0).fuse(OneRoundProbe(local=sgd(1, 0.1)))
    assert str(caught.value) == (
        "no client has validation examples to measure a loss on\n"
        "  where: data.validation_fraction\n"
        "  fix:   set apart a part of each client's data, such as 0.1"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_points": 2}, "num_points is 2\n  where: method.num_points\n  fix:   give at least 3"),
        ({"num_anchors": -1}, "num_anchors is -1\n  where: method.num_anchors\n  fix:   give at least 0"),
        ({"num_curved": 65}, "num_curved is 65\n  where: method.num_curved\n  fix:   give at most 64"),
        ({"sketch_size": 0}, "sketch_size is 0\n  where: method.sketch_size\n  fix:   give at least 1"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        OneRoundProbe(**settings)
    assert str(caught.value) == message


def test_points_keep_whole_numbers_and_reach_every_anchor() -> None:
    start = {"w": torch.zeros(2), "n": torch.tensor(0)}
    ends = [
        {"w": torch.tensor([1.0, 0.0]), "n": torch.tensor(5)},
        {"w": torch.tensor([0.0, 1.0]), "n": torch.tensor(7)},
    ]
    rows, _ = line_points(["mean", "a"], 3)
    assert rows == [[0.0, 0.0], [0.5, 0.0], [1.0, 0.0]]
    found = point_between(start, ends, [0.25, 0.5])
    assert found["w"].tolist() == [0.25, 0.5]
    assert found["n"].item() == 5


def language_model() -> ModelSpec:
    from fedfuse.models import spec

    config = {"model_type": "llama", "vocab_size": 20, "hidden_size": 16, "intermediate_size": 16}
    config |= {"num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": None}
    settings = {"config": config, "task": "causal_lm", "peft": {"kind": "lora", "rank": 2}}
    return spec("transformers", settings, input_shape=(8,), num_classes=2, seed=0)


def test_a_language_model_learns_its_own_objective_and_is_measured_by_it() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    model = language_model()

    def dialogues(n: int, seed: int) -> Examples:
        tokens = torch.randint(0, 20, (n, 4), generator=torch.Generator().manual_seed(seed)).float()
        return Examples(
            torch.cat([tokens, torch.tensor([[0.0, 0.0, 1.0, 1.0]]).repeat(n, 1)], 1), torch.zeros(n).long()
        )

    data = {f"c{k}": ClientData(dialogues(6, k), dialogues(3, 10 + k), 2) for k in range(2)}
    runtime = LocalRuntime({c: ClientSide(c, part, model) for c, part in data.items()}, workers=1)
    local = LocalSGD(num_epochs=2, batch_size=3, optimizer="adamw", learning_rate=0.01)
    probe = OneRoundProbe(local=local, num_iterations=2)
    job = Job(model=model, rng=Rng(1), device=torch.device("cpu"))
    fused = probe.fuse(Cohort(runtime=runtime, method=probe, model_of=job.model_of, seed=3), job)
    facts = job.facts["one_round"]
    assert facts["path_lengths"] == [None, None]
    assert facts["momentum"] == 0.0
    # Only the adapters are trained: A and B of two projections, 16 wide, of rank 2.
    assert (
        facts["num_parameters"] == sum(tensor.numel() for tensor in model.build().state_dict().values()) == 2 * 2 * 32
    )
    assert fused.model is not None
    x = torch.cat([part.validation.x for part in data.values()])
    for module, place in ((model.build().eval(), 0), (fused.model.module(), -1)):
        assert facts["lines"][0]["losses"][place] == pytest.approx(module.objective(x, None).item(), rel=1e-5)
    assert all(0 < size < 1 for size in facts["base_updates"])


def test_products_are_the_same_read_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    draw = torch.Generator().manual_seed(0)
    states = [{name: torch.randn(3, 5, generator=draw) for name in "ab"} for _ in range(4)]
    uploads = [Payload().put_group("model", state) for state in states[:2]]
    whole = update_products(uploads, states[2], states[3], ["a", "b"])
    monkeypatch.setattr("fedfuse.methods.one_round_facts._PART_BYTES", 50)
    torch.testing.assert_close(update_products(uploads, states[2], states[3], ["a", "b"]), whole)
    moves = [torch.cat([(state[name] - states[3][name]).reshape(-1) for name in "ab"]).double() for state in states[:3]]
    torch.testing.assert_close(whole, torch.stack(moves) @ torch.stack(moves).T, rtol=1e-6, atol=1e-5)


def test_lora_is_measured_against_its_base() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    from fedfuse.models import spec
    from fedfuse.models.foundation.foundation import Foundation
    from fedfuse.models.foundation.lora import lora_layout

    model = language_model()
    layout, module = lora_layout(model), model.build()
    assert isinstance(module, Foundation)
    state = module.state_dict()
    # B is zero at first: no change. With B of ones the change is scale * (column sums of A) in every row.
    assert base_updates(model, [state]) == [0.0]
    square, base = 0.0, 0.0
    for name, place in layout.modules.items():
        state[place.left_key] = torch.ones_like(state[place.left_key])
        row = place.scale * state[place.right_key].double().sum(0)
        square += place.shape[0] * float(row @ row)
        base += float(module.weight_of(name).detach().double().square().sum())
    assert base_updates(model, [state]) == pytest.approx([(square / base) ** 0.5])
    assert base_updates(spec("mlp", {}, input_shape=(4,), num_classes=2, seed=0), []) is None
