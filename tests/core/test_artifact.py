"""Artifacts: saved, read, damaged and loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fedfuse.core.artifact import Artifact, ModelSpec, build, detached_state, load, load_state
from fedfuse.core.errors import ArtifactError, ModelError, RegistryError
from fedfuse.core.registry import RECIPES, register_recipe

RECIPE = {"kind": "artifact_toy", "width": 3}


def toy(recipe: Mapping[str, Any]) -> nn.Module:
    return nn.Sequential(nn.Linear(2, recipe["width"]), nn.BatchNorm1d(recipe["width"]))


@pytest.fixture(autouse=True)
def _toy_is_registered() -> Iterator[None]:
    register_recipe("artifact_toy")(toy)
    yield
    del RECIPES._entries["artifact_toy"], RECIPES._facts["artifact_toy"]


@pytest.fixture
def spec() -> ModelSpec:
    return ModelSpec(RECIPE, seed=1, input_shape=(2,), num_classes=3)


@pytest.fixture
def artifact(spec: ModelSpec) -> Artifact:
    module = spec.build()
    module(spec.example_input(8))
    return Artifact(RECIPE, detached_state(module), info={"classes": ["ä", "b", "c"]})


def states_equal(a: Mapping[str, torch.Tensor], b: Mapping[str, torch.Tensor]) -> bool:
    return list(a) == list(b) and all(a[k].equal(b[k]) and a[k].dtype == b[k].dtype for k in a)


# --- specifications


def test_every_build_gives_equal_weights_of_its_own(spec: ModelSpec) -> None:
    torch.manual_seed(0)
    first = spec.build()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    second = spec.build()
    assert torch.get_rng_state().equal(before)
    assert states_equal(first.state_dict(), second.state_dict())
    nn.init.zeros_(first[0].weight)
    assert second[0].weight.abs().sum() > 0


def test_another_seed_gives_other_weights(spec: ModelSpec) -> None:
    other = ModelSpec(RECIPE, seed=2, input_shape=(2,), num_classes=3)
    assert not spec.build()[0].weight.equal(other.build()[0].weight)


def test_initial_weights_are_used(spec: ModelSpec) -> None:
    initial = {name: torch.full_like(value, 2) for name, value in spec.build().state_dict().items()}
    given = ModelSpec(RECIPE, seed=1, input_shape=(2,), num_classes=3, initial=initial)
    assert states_equal(given.build().state_dict(), initial)


def test_a_template_is_copied() -> None:
    template = nn.Linear(2, 3)
    spec = ModelSpec({}, seed=1, input_shape=(2,), num_classes=3, template=template)
    built = spec.build()
    assert built is not template
    assert built.weight.equal(template.weight)


def test_example_inputs_are_the_same_every_time(spec: ModelSpec) -> None:
    assert spec.example_input().shape == (2, 2)
    assert spec.example_input(5).equal(spec.example_input(5))


def test_the_digest_sees_all_that_decides_the_first_weights(spec: ModelSpec) -> None:
    state = spec.build().state_dict()
    variants = [
        spec,
        ModelSpec({**RECIPE, "width": 4}, 1, (2,), 3),
        ModelSpec(RECIPE, 2, (2,), 3),
        ModelSpec(RECIPE, 1, (3,), 3),
        ModelSpec(RECIPE, 1, (2,), 4),
        ModelSpec(RECIPE, 1, (2,), 3, initial=state),
        ModelSpec(RECIPE, 1, (2,), 3, initial={**state, "0.bias": state["0.bias"] + 1}),
    ]
    assert len({each.digest for each in variants}) == len(variants)
    assert spec.digest == ModelSpec(dict(reversed(RECIPE.items())), 1, (2,), 3).digest


# --- recipes


@pytest.mark.parametrize(
    ("recipe", "text"),
    [
        ({}, 'the recipe has no "kind": {}\n  fix:   a recipe is a table with a kind'),
        ({"kind": 3}, "the recipe has no \"kind\": {'kind': 3}\n  fix:   a recipe is a table with a kind"),
        ([], 'the recipe has no "kind": []\n  fix:   a recipe is a table with a kind'),
        (
            {"kind": "artifact_toy"},
            "the recipe of kind \"artifact_toy\" is broken: KeyError: 'width'\n  where: {'kind': 'artifact_toy'}",
        ),
    ],
)
def test_a_recipe_that_cannot_be_built(recipe: Any, text: str) -> None:
    with pytest.raises(ModelError) as caught:
        build(recipe)
    assert str(caught.value) == text


def test_a_recipe_of_an_unknown_kind() -> None:
    with pytest.raises(RegistryError, match=r'^there is no recipe "artifact_toi"'):
        build({"kind": "artifact_toi"})


# --- states

FIX = "\n  fix:   use weights of the same architecture"


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({}, "missing ['bias', 'weight'], unexpected nothing"),
        (
            {"weight": torch.zeros(3, 2), "bias": torch.zeros(3), "z": torch.zeros(1)},
            "missing nothing, unexpected ['z']",
        ),
        ({"weight": torch.zeros(3, 2), "b": torch.zeros(3)}, "missing ['bias'], unexpected ['b']"),
        ({"weight": torch.zeros(3, 1), "bias": torch.zeros(3)}, '"weight" has shape (3, 1), wanted (3, 2)'),
    ],
    ids=["missing", "unexpected", "both", "shape"],
)
def test_weights_that_do_not_fit_are_told_and_nothing_is_loaded(state: dict[str, torch.Tensor], text: str) -> None:
    module = nn.Linear(2, 3)
    before = detached_state(module)
    with pytest.raises(ModelError) as caught:
        load_state(module, state)
    assert str(caught.value) == f"the weights do not fit the model: {text}" + FIX
    assert states_equal(module.state_dict(), before)


def test_weights_of_another_precision_are_turned_into_the_modules_own() -> None:
    # Adaptors may travel in bfloat16 and are computed with in float32.
    module = nn.Linear(2, 3)
    load_state(module, {"weight": torch.full((3, 2), 0.5).bfloat16(), "bias": torch.ones(3).bfloat16()})
    assert {value.dtype for value in module.state_dict().values()} == {torch.float32}
    assert module.weight.tolist() == [[0.5, 0.5]] * 3


def test_a_detached_state_is_a_copy_in_the_modules_order() -> None:
    module = nn.Linear(2, 3)
    state = detached_state(module)
    assert list(state) == ["weight", "bias"]
    assert not state["weight"].requires_grad
    state["weight"].zero_()
    assert module.weight.abs().sum() > 0


# --- artifacts


def test_what_is_saved_is_read(artifact: Artifact, tmp_path: Path) -> None:
    folder = artifact.save(tmp_path / "deep" / "a")
    found = Artifact.read(str(folder))
    assert sorted(path.name for path in folder.iterdir()) == ["fused.json", "model.safetensors"]
    assert found.recipe == RECIPE
    assert found.info == artifact.info
    assert found.state["1.num_batches_tracked"].dtype == torch.int64
    assert found.state["1.num_batches_tracked"].item() == 1
    assert found.digest() == artifact.digest()
    assert found.num_bytes == artifact.num_bytes == (6 + 3 + 4 * 3) * 4 + 8


def test_saving_again_gives_the_same_bytes(artifact: Artifact, tmp_path: Path) -> None:
    artifact.save(tmp_path / "a")
    Artifact.read(tmp_path / "a").save(tmp_path / "b")
    for name in ("fused.json", "model.safetensors"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_module_of_an_artifact_is_ready_for_use(artifact: Artifact, spec: ModelSpec, tmp_path: Path) -> None:
    module = load(artifact.save(tmp_path))
    assert not module.training
    assert states_equal(module.state_dict(), artifact.module().state_dict())
    assert module(spec.example_input()).equal(artifact.module()(spec.example_input()))


def test_a_runs_folder_may_be_named_instead(artifact: Artifact, tmp_path: Path) -> None:
    artifact.save(tmp_path / "artifact")
    assert states_equal(load(tmp_path).state_dict(), artifact.module().state_dict())


def test_a_module_that_no_recipe_describes_is_filled(tmp_path: Path) -> None:
    own = nn.Linear(2, 3)
    spec = ModelSpec({}, 1, (2,), 3, template=own)
    folder = Artifact.of(spec, detached_state(own)).save(tmp_path)
    other = nn.Linear(2, 3)
    found = load(folder, model=other)
    assert found is not other
    assert found.weight.equal(own.weight)
    with pytest.raises(ModelError, match=r'^the recipe has no "kind"'):
        load(folder)


def test_the_digest_sees_every_bit_and_not_the_order(artifact: Artifact) -> None:
    state = dict(artifact.state)
    bits = state["0.weight"].clone()
    bits.view(torch.int32)[0, 0] ^= 1
    assert Artifact(RECIPE, {**state, "0.weight": bits}).digest() != artifact.digest()
    assert Artifact({**RECIPE, "width": 4}, state).digest() != artifact.digest()
    assert Artifact(dict(reversed(RECIPE.items())), dict(reversed(state.items()))).digest() == artifact.digest()


NOT_WHOLE = "\n  where: {}\n  fix:   name a folder that holds fused.json and model.safetensors"
CHANGED = (
    "the artifact's content does not agree with its digest\n  where: {}\n"
    "  fix:   it was changed or damaged: copy it again"
)


def read_error(folder: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        load(folder)
    return str(caught.value)


def test_a_folder_without_an_artifact(artifact: Artifact, tmp_path: Path) -> None:
    missing = "this is no artifact: [Errno 2] No such file or directory: '{}'"
    assert read_error(tmp_path) == missing.format(tmp_path / "fused.json") + NOT_WHOLE.format(tmp_path)
    artifact.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert read_error(tmp_path) == missing.format(tmp_path / "model.safetensors") + NOT_WHOLE.format(tmp_path)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("{}", "'recipe'"),
        ("[]", "list indices must be integers or slices, not str"),
    ],
)
def test_a_damaged_description(text: str, reason: str, artifact: Artifact, tmp_path: Path) -> None:
    artifact.save(tmp_path)
    (tmp_path / "fused.json").write_text(text)
    assert read_error(tmp_path) == f"this is no artifact: {reason}" + NOT_WHOLE.format(tmp_path)


def test_damaged_weights(artifact: Artifact, tmp_path: Path) -> None:
    artifact.save(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert read_error(tmp_path) == CHANGED.format(tmp_path)
    path.write_bytes(whole[:4])
    assert read_error(tmp_path) == (
        f"model.safetensors is broken: the bytes are not a payload: 4 bytes with a header of "
        f"{int.from_bytes(whole[:4], 'little')}\n  where: {tmp_path}\n  fix:   copy the artifact again"
    )


def test_a_changed_recipe(artifact: Artifact, tmp_path: Path) -> None:
    artifact.save(tmp_path)
    facts = json.loads((tmp_path / "fused.json").read_text())
    facts["recipe"]["width"] = 4
    (tmp_path / "fused.json").write_text(json.dumps(facts))
    assert read_error(tmp_path) == CHANGED.format(tmp_path)


def test_no_damaged_byte_is_read_in_silence(artifact: Artifact, tmp_path: Path) -> None:
    artifact.save(tmp_path)
    path = tmp_path / "model.safetensors"
    whole = path.read_bytes()
    for position in range(len(whole)):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x10]) + whole[position + 1 :])
        try:
            found = Artifact.read(tmp_path)
        except ArtifactError:
            continue
        # White space of the header carries nothing.
        assert found.digest() == artifact.digest()
