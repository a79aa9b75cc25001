"""The server's account of what left its clients, and the noise of the mean."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedfuse.core.errors import ConfigError, UploadRefused
from fedfuse.core.gaussian import gaussian_epsilon
from fedfuse.core.guarantee import Releases
from fedfuse.core.journal import Entry, Journal
from fedfuse.core.payload import Payload
from fedfuse.core.release import Privacy
from fedfuse.core.seeding import Rng


def entries_of(**uploads: Payload) -> dict[str, Entry]:
    journal = Journal()
    return {
        client_id: journal.put(client_id, upload.encode(), {"client": client_id})
        for client_id, upload in uploads.items()
    }


def central(**settings: Any) -> Privacy:
    return Privacy(**{"mechanism": "central", "clip_norm": 1.0, "noise_multiplier": 1.0, **settings})


def test_without_a_section_replies_stay_and_nothing_is_claimed() -> None:
    releases, entries = Releases(), entries_of(a=Payload({"x": 1}))
    releases.begin("models")
    releases.note("models", "a", entries["a"].open())

    assert releases.seen_by_method("models", entries) == entries
    assert releases.terms() == {}
    assert releases.guarantee() is None


def test_the_method_sees_the_noisy_mean_n_times() -> None:
    n, width, clip, sigma = 4, 20_000, 3.0, 2.0
    uploads = {f"c{i}": Payload({"x": torch.full((width,), float(i)), "num_examples": 1}) for i in range(n)}
    releases = Releases(central(clip_norm=clip, noise_multiplier=sigma, constants={"num_examples": 1}), Rng(4))
    seen = releases.seen_by_method("models", entries_of(**uploads))

    assert list(seen) == list(uploads)
    first = seen["c0"].payload()
    assert all(entry.payload().digest() == first.digest() for entry in seen.values())
    assert first["num_examples"] == 1
    z = (first.tensor("x").double() - 1.5) / (sigma * clip / n)
    assert abs(float((z**2).sum()) - width) < 5 * (2 * width) ** 0.5
    assert abs(float(z.sum())) < 5 * width**0.5


def test_constants_and_whole_numbers_get_no_noise() -> None:
    upload = Payload({"x": torch.ones(3), "known/x": torch.ones(3), "label_counts": torch.tensor([1, 1])})
    releases = Releases(central(constants={"known/*": 1, "label_counts": 1}), Rng(4))
    seen = releases.seen_by_method("models", entries_of(a=upload, b=upload))["a"].payload()

    assert seen.tensor("known/x").tolist() == [1, 1, 1]
    assert seen.tensor("label_counts").tolist() == [1, 1]
    assert not (seen.tensor("x") == 1).any()


@given(st.lists(st.floats(-1, 1), min_size=2, max_size=6))
def test_without_noise_it_is_the_mean(values: list[float]) -> None:
    uploads = {f"c{i}": Payload({"x": torch.tensor([value], dtype=torch.float64)}) for i, value in enumerate(values)}
    seen = Releases(central(noise_multiplier=0.0)).seen_by_method("models", entries_of(**uploads))

    assert seen["c0"].payload().tensor("x").item() == pytest.approx(sum(values) / len(values), abs=1e-12)


def test_another_set_of_replies_gets_other_noise() -> None:
    uploads = {name: Payload({"x": torch.zeros(5)}) for name in "abc"}

    def seen(names: str, rng: Rng | None = None) -> torch.Tensor:
        entries = entries_of(**{name: uploads[name] for name in names})
        return Releases(central(), rng or Rng(4)).seen_by_method("m", entries)["a"].payload().tensor("x")

    assert torch.equal(seen("abc"), seen("abc"))
    for other in (seen("ab") * 2 / 3, seen("abc", Rng(5)), seen("abc", Rng(4, b"s" * 32))):
        assert not torch.isclose(other, seen("abc")).any()


def test_models_of_different_shapes_have_no_mean() -> None:
    entries = entries_of(a=Payload({"x": torch.zeros(2)}), b=Payload({"x": torch.zeros(3)}))

    with pytest.raises(UploadRefused, match='uploads that differ in "x" have no mean'):
        Releases(central()).seen_by_method("m", entries)


def test_the_budget_is_kept() -> None:
    releases = Releases(Privacy(clip_norm=1.0, epsilon=8.0, num_releases=2))
    releases.begin("round_0")
    releases.begin("round_1")

    assert releases.guarantee() is not None
    with pytest.raises(ConfigError) as caught:
        releases.begin("round_2")
    assert str(caught.value) == (
        'the exchange "round_2" would be release 3 of each client, but the noise for epsilon 8 was made for 2\n'
        "  where: privacy.num_releases\n"
        "  fix:   give the number of exchanges of the method"
    )


def account(releases: Releases, *exchanges: str, **keys: Any) -> dict[str, Any]:
    for exchange in exchanges:
        releases.begin(exchange)
        releases.note(exchange, "a", Payload(keys))
    found = releases.guarantee()
    assert found is not None
    # It goes into result.json.
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_releases_of_one_run_compose() -> None:
    privacy = Privacy(clip_norm=1.0, noise_multiplier=4.0, public=("num_examples",), constants={"label_counts": 1})
    upload = {"model/w": torch.ones(1), "model/b": torch.ones(1), "num_examples": 3, "label_counts": torch.ones(1)}
    found = account(Releases(privacy), "a", "b", "c", "d", **upload)

    assert found["epsilon"] == pytest.approx(gaussian_epsilon(2.0, 1e-5))
    assert found["epsilon_if_replaced"] == pytest.approx(gaussian_epsilon(1.0, 1e-5))
    assert (found["covers"], found["public"], found["constants"]) == (["model/*"], ["num_examples"], ["label_counts"])
    assert found["holds"]
    assert found["lines"] == [
        "Differential privacy (local): epsilon 1.99 at delta 1e-05, 4 releases together, for model/*.",
        "Neighbours: one client's upload against none.",
        "If one client's upload is replaced by any other: epsilon 4.38.",
        "Called public by the operator, left as they are: num_examples.",
        "The noise comes from the run's seed: who knows the seed can take it away. Simulations only.",
    ]


def test_clipping_alone_guarantees_nothing() -> None:
    found = account(Releases(Privacy(clip_norm=1.0, noise_multiplier=0.0)), "m", x=torch.ones(1))

    assert (found["holds"], found["epsilon"]) == (False, None)
    assert found["lines"][0] == "No guarantee: nothing that was added could hide anything."


def test_private_training_alone_covers_the_weights_alone() -> None:
    upload = {"model/w": torch.ones(1), "num_examples": 3, "curve/epsilon": torch.tensor([2.5])}
    found = account(Releases(training_delta=1e-5), "m", **upload)

    assert not found["holds"]
    assert found["lines"][0] == (
        "No guarantee for the uploads as a whole: num_examples left without noise. "
        "For model/* alone it is epsilon 2.50 at delta 1e-05."
    )


def test_private_training_of_several_exchanges_adds_up() -> None:
    privacy = Privacy(mechanism="trained", constants={"num_examples": 1})
    upload = {"model/w": torch.ones(1), "num_examples": 1, "curve/epsilon": torch.tensor([2.5])}
    found = account(Releases(privacy, is_secret=True, training_delta=1e-5), "m", "n", **upload)

    assert (found["epsilon"], found["delta"], found["epsilon_by_client"]) == (5.0, 2e-5, {"a": 5.0})
    assert found["lines"] == [
        "Differential privacy (trained): epsilon 5.00 at delta 2e-05, 2 releases together, for model/*.",
        "Neighbours: one training example of a client added or removed.",
    ]


def test_whoever_looks_uploads_over_sees_what_is_the_clients_own() -> None:
    upload = Payload({"model/w": torch.ones(1), "num_examples": 1, "label_counts": torch.ones(2)})
    private = Releases(Privacy(clip_norm=1.0, epsilon=1.0, constants={"num_examples": 1, "label_*": 1}))
    own = private.own_part(upload)

    assert (list(own), len(own)) == (["model/w"], 1)
    assert own["model/w"] is upload["model/w"]
    assert own.get("num_examples") is None
    assert Releases().own_part(upload) is upload
    assert [Releases().hides_single_uploads, private.hides_single_uploads] == [False, False]
    assert Releases(central()).hides_single_uploads
