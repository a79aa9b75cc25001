"""What leaves a client under differential privacy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedfuse import models
from fedfuse.core.artifact import ModelSpec
from fedfuse.core.errors import ConfigError, DataError, FedfuseError, TaskError
from fedfuse.core.gaussian import gaussian_noise_multiplier
from fedfuse.core.payload import Payload
from fedfuse.core.release import Privacy, clip_factor, release
from fedfuse.core.seeding import Rng
from fedfuse.core.settings import from_json

SPEC = models.spec("cnn", {"width": 2, "depth": 1}, input_shape=(1, 8, 8), num_classes=3, seed=0)
NOTHING = Payload().encode()


def released(
    upload: Payload, *, message: bytes = NOTHING, model: ModelSpec = SPEC, rng: Rng | None = None, **settings: Any
) -> Payload:
    privacy = Privacy(**{"clip_norm": 1.0, "noise_multiplier": 0.0, **settings})
    return release(upload, privacy.terms(), message, model, rng or Rng(1))


def norm_of(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float((tensor.double() ** 2).sum()) for tensor in tensors.values()))


def trained(scale: float) -> dict[str, Tensor]:
    """Weights some way off the first ones."""
    draw = torch.Generator().manual_seed(5)
    return {
        name: tensor + scale * torch.randn(tensor.shape, generator=draw) if tensor.is_floating_point() else tensor + 7
        for name, tensor in SPEC.build().state_dict().items()
    }


def test_the_clip_factor_is_over_all_tensors_together() -> None:
    moves = {"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])}

    assert clip_factor(moves, 2.5) == 0.5
    assert clip_factor(moves, 5.0) == 1.0
    assert clip_factor(moves, None) == 1.0
    assert clip_factor({}, 1.0) == 1.0


def test_other_tensors_are_clipped_by_themselves() -> None:
    found = released(Payload({"sums/a": torch.tensor([3.0]), "sums/b": torch.tensor([4.0])}))

    assert found.tensor("sums/a").item() == pytest.approx(0.6)
    assert found.tensor("sums/b").item() == pytest.approx(0.8)


def test_weights_are_clipped_by_their_difference_to_the_first_ones() -> None:
    first = SPEC.build().state_dict()
    found = released(Payload().put_group("model", trained(10.0))).group("model")

    floats = [name for name, tensor in first.items() if tensor.is_floating_point()]
    assert norm_of({name: found[name] - first[name] for name in floats}) == pytest.approx(1.0, rel=1e-5)
    # A count of batches can bear no noise, so it says nothing.
    assert [found[name].item() for name in first if name not in floats] == [0]


def test_weights_are_clipped_by_their_difference_to_what_was_sent() -> None:
    state = trained(10.0)
    sent = {name: tensor + 1 if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    message = Payload().put_group("model", sent).encode()
    found = released(Payload().put_group("model", state), message=message).group("model")

    floats = [name for name, tensor in sent.items() if tensor.is_floating_point()]
    assert norm_of({name: found[name] - sent[name] for name in floats}) == pytest.approx(1.0, rel=1e-4)
    assert [int(found[name]) for name in sent if name not in floats] == [7]


def test_the_noise_has_the_declared_deviation() -> None:
    n = 40_000
    upload = Payload({"sums/x": torch.zeros(n, dtype=torch.float64)})
    z = released(upload, clip_norm=4.0, noise_multiplier=0.5).tensor("sums/x") / 2.0

    assert abs(float((z**2).sum()) - n) < 5 * math.sqrt(2 * n)
    assert abs(float(z.sum())) < 5 * math.sqrt(n)


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8),
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8),
    st.floats(1e-3, 1e3),
)
def test_a_client_changes_the_sum_by_at_most_the_clip_norm(one: list[float], other: list[float], clip: float) -> None:
    upload = Payload({"a": torch.tensor(one, dtype=torch.float64), "b": torch.tensor(other, dtype=torch.float64)})
    found = released(upload, clip_norm=clip)

    assert norm_of({"a": found.tensor("a"), "b": found.tensor("b")}) <= clip * (1 + 1e-12)


@given(st.integers(0, 2**32), st.sampled_from([torch.float32, torch.float64]))
def test_no_released_number_is_the_true_one(seed: int, dtype: torch.dtype) -> None:
    true = torch.randn(64, generator=torch.Generator().manual_seed(seed), dtype=dtype) / 64
    found = released(Payload({"x": true}), noise_multiplier=1.0, rng=Rng(seed)).tensor("x")

    assert found.dtype == dtype
    assert not (found == true).any()


def test_noise_is_repeated_for_the_same_upload_only() -> None:
    upload, other = Payload({"x": torch.zeros(9)}), Payload({"x": torch.full((9,), 1e-3)})

    def noise_of(upload: Payload, rng: Rng | None = None, message: bytes = NOTHING) -> Tensor:
        return released(upload, noise_multiplier=1.0, rng=rng, message=message).tensor("x") - upload.tensor("x")

    first = noise_of(upload)
    assert torch.equal(first, noise_of(upload))
    # Two releases with the same noise would give away their difference.
    sent = Payload({"what": 1}).encode()
    for another in (noise_of(other), noise_of(upload, Rng(2)), noise_of(upload, message=sent)):
        assert (another - first).abs().min() > 1e-4
    secret = noise_of(upload, Rng(1, b"s" * 32))
    assert not (secret == first).any()
    assert torch.equal(secret, noise_of(upload, Rng(1, b"s" * 32)))


def test_curves_are_left_out_and_scalars_need_a_word() -> None:
    upload = Payload(
        {"x": torch.ones(2), "num_examples": 12, "label_counts": torch.tensor([5, 7]), "curve/loss": torch.ones(3)}
    )

    kept = released(upload, public=("num_examples", "label_counts"))
    assert {key: kept[key] for key in ("num_examples",)} == {"num_examples": 12}
    assert kept.tensor("label_counts").tolist() == [5, 7]
    replaced = released(upload, constants={"num_examples": 1, "label_*": 1})
    assert (replaced["num_examples"], replaced.tensor("label_counts").tolist()) == (1, [1, 1])
    assert list(kept) == list(replaced) == ["label_counts", "num_examples", "x"]


@pytest.mark.parametrize(
    ("upload", "settings", "message"),
    [
        (
            {"num_examples": 3},
            {},
            (
                'the private upload holds "num_examples": no tensor, so it gets no noise\n'
                "  where: privacy\n"
                "  fix:   name it in privacy.constants: {num_examples: 1} to replace it, or in privacy.public: "
                "[num_examples] if it is known anyway"
            ),
        ),
        (
            {"label_counts": torch.tensor([1, 2])},
            {"mechanism": "central"},
            (
                'the private upload holds "label_counts": whole numbers, which get no noise\n'
                "  where: privacy\n"
                "  fix:   name it in privacy.constants: {label_counts: 1} to replace it"
            ),
        ),
        (
            {"model/w": torch.ones(1), "fisher/w": torch.ones(1)},
            {"keys": ("model/*",)},
            (
                'the private upload holds "fisher/w": a tensor that privacy.keys does not name\n'
                "  where: privacy\n"
                "  fix:   name it in privacy.constants: {fisher/w: 1} to replace it, or in privacy.public: [fisher/w] "
                "if it is known anyway"
            ),
        ),
        (
            {"name": "a"},
            {"constants": {"name": 1}},
            '"name" is a text\n  where: privacy.constants\n  fix:   name it in privacy.public',
        ),
    ],
)
def test_what_the_operator_did_not_name_is_refused(
    upload: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(TaskError) as caught:
        released(Payload(upload), **settings)

    assert str(caught.value) == message


def test_infinite_values_are_refused_before_they_leave() -> None:
    with pytest.raises(DataError, match="holds NaN or infinite values, which no clipping can bound"):
        released(Payload({"x": torch.tensor([math.nan])}))


def test_a_variance_stays_above_zero() -> None:
    spec = SPEC.build().state_dict()
    name = next(name for name in spec if name.endswith("running_var"))
    found = released(Payload().put_group("model", spec), clip_norm=1.0, noise_multiplier=100.0)

    assert float(found.tensor(f"model/{name}").min()) == pytest.approx(1e-5)


def test_weights_that_were_trained_privately_leave_as_they_are() -> None:
    upload = Payload({"model/w": torch.ones(2), "num_examples": 9, "curve/epsilon": torch.tensor([2.0])})
    settings = {"mechanism": "trained", "clip_norm": None, "noise_multiplier": None, "constants": {"num_examples": 1}}

    found = released(upload, **settings)
    assert found.tensor("model/w").tolist() == [1, 1]
    assert (found["num_examples"], found.tensor("curve/epsilon").item()) == (1, 2.0)
    del upload["curve/epsilon"]
    with pytest.raises(TaskError, match="an upload is to leave without noise, but it was not trained privately"):
        released(upload, **settings)


def test_clients_are_told_the_noise_only_where_they_make_it() -> None:
    local = Privacy(clip_norm=2.0, epsilon=3.0).terms()
    central = Privacy(mechanism="central", clip_norm=2.0, epsilon=3.0).terms()

    assert local["noise_multiplier"] == pytest.approx(gaussian_noise_multiplier(3.0, 1e-5))
    assert central == {**local, "mechanism": "central", "noise_multiplier": 0.0}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"noise_multiplier": 1.0},
            (
                'the setting "clip_norm" is missing\n  where: privacy.clip_norm\n'
                "  fix:   give the largest L2 norm of an upload; about the median norm of honest updates is a good "
                "start"
            ),
        ),
        (
            {"clip_norm": 1.0},
            "the noise is not determined\n  where: privacy\n  fix:   give either noise_multiplier or epsilon",
        ),
        (
            {"clip_norm": 1.0, "noise_multiplier": 1.0, "epsilon": 1.0},
            "the noise is not determined\n  where: privacy\n  fix:   give either noise_multiplier or epsilon",
        ),
        (
            {"clip_norm": 0.0, "noise_multiplier": 1.0},
            "clip_norm is 0\n  where: privacy.clip_norm\n  fix:   give a number above 0",
        ),
        (
            {"clip_norm": 1.0, "noise_multiplier": -1.0},
            "noise_multiplier is -1\n  where: privacy.noise_multiplier\n  fix:   give 0 or more",
        ),
        (
            {"clip_norm": 1.0, "epsilon": 1.0, "delta": 1.0},
            "delta is 1\n  where: privacy.delta\n  fix:   give a number between 0 and 1",
        ),
        (
            {"clip_norm": 1.0, "epsilon": 1.0, "num_releases": 0},
            "num_releases is 0\n  where: privacy.num_releases\n  fix:   give at least 1",
        ),
        (
            {"mechanism": "central", "clip_norm": 1.0, "epsilon": 1.0, "public": ["num_examples"]},
            (
                "the noise of the mean is made for uploads of equal weight\n  where: privacy.public\n"
                "  fix:   name these keys in privacy.constants, such as {num_examples: 1}"
            ),
        ),
        (
            {"mechanism": "trained", "epsilon": 1.0},
            (
                "epsilon has no meaning where the noise is in the training\n  where: privacy.epsilon\n"
                "  fix:   set method.local.privacy, or mechanism: local"
            ),
        ),
        (
            {"clip": 1.0},
            (
                'unknown setting "clip"\n  where: privacy.clip\n  fix:   did you mean "clip_norm"? known: clip_norm, '
                "constants, delta, epsilon, keys, mechanism, noise, noise_multiplier, num_releases, public"
            ),
        ),
    ],
)
def test_settings_that_cannot_be_are_told(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_json(Privacy, settings, where="privacy")

    assert str(caught.value) == message


@given(st.dictionaries(st.text(max_size=8), st.none() | st.integers() | st.text(max_size=3) | st.lists(st.text())))
def test_any_terms_from_a_server_end_in_an_upload_or_one_error(terms: dict[str, Any]) -> None:
    try:
        release(Payload({"x": torch.ones(2)}), terms, NOTHING, SPEC, Rng(0))
    except FedfuseError:
        pass
