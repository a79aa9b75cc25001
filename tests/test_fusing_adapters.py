"""Fusing adapters as PEFT writes them: what comes out."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import fedfuse
from adapter_folders import (
    STEM,
    WEIGHTS,
    WIDTH,
    assert_equal,
    deltas,
    exact,
    make,
    make_three,
    refused,
)
from fedfuse.core.errors import ArtifactError, ModelError
from fedfuse.core.payload import PayloadFile
from fedfuse.core.registry import RULES
from fedfuse.fusing import compare_rules, fuse_adapters
from fedfuse.fusing.adapter import Adapter
from fedfuse.fusing.adapter_config import AdapterConfig


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Adapters that differ in rank, alpha, rsLoRA and targets."""
    return make_three(tmp_path)


# --- what comes out


def test_stacking_is_the_exact_sum_over_ranks_scales_and_targets_that_differ(three: list[Path], tmp_path: Path) -> None:
    done = fuse_adapters(three, weights=WEIGHTS, out=tmp_path / "fused")
    assert done.folder == tmp_path / "fused"
    assert_equal(deltas(done.folder), exact(three, WEIGHTS))
    assert done.error.relative == 0.0
    assert {module.rpartition(".")[2]: rank for module, rank in done.ranks.items()} == {
        "q_proj": 6,
        "v_proj": 5,
        "k_proj": 1,
    }
    assert done.notes == ("4 weights are changed by some adapters only, and count as unchanged in the others",)
    table = json.loads((done.folder / "adapter_config.json").read_text())
    assert (table["peft_type"], table["base_model_name_or_path"], table["task_type"]) == ("LORA", "tiny", "CAUSAL_LM")
    assert table["target_modules"] == ["k_proj", "q_proj", "v_proj"]
    assert (table["use_rslora"], table["lora_dropout"], table["inference_mode"]) == (False, 0.0, True)
    # The scale is 1 everywhere.
    assert table["rank_pattern"] == table["alpha_pattern"]
    assert table["r"] == table["lora_alpha"]


def test_fuse_is_the_same_door_for_adapters(three: list[Path], tmp_path: Path) -> None:
    assert fedfuse.fuse(three, weights=[5, 3, 2], out=str(tmp_path / "fused")) == tmp_path / "fused"
    assert_equal(deltas(tmp_path / "fused"), exact(three, WEIGHTS))
    assert fedfuse.fuse(three, method="svd", rank=4, out=tmp_path / "svd") == tmp_path / "svd"


def test_the_order_of_the_paths_changes_no_bit(three: list[Path], tmp_path: Path) -> None:
    for method in ("flora", "svd", "fedex", "average", "slerp", "dare"):
        one = fuse_adapters(three, method=method, weights=WEIGHTS, out=tmp_path / method / "one").folder
        two = fuse_adapters(three[::-1], method=method, weights=WEIGHTS[::-1], out=tmp_path / method / "two").folder
        for name in ("adapter_model.safetensors", "adapter_config.json", "README.md"):
            assert (one / name).read_bytes() == (two / name).read_bytes()


def test_adapters_that_begin_alike_are_told_apart(tmp_path: Path) -> None:
    tail = {"base_model.model.z": torch.zeros(200_000, dtype=torch.float64)}
    folders = [make(tmp_path / "a", extra=tail), make(tmp_path / "b", extra=tail), make(tmp_path / "c", extra=tail)]
    for number, folder in enumerate(folders[1:], start=1):
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors["base_model.model.z"][-1] = number
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    assert len({Adapter(folder).beginning for folder in folders}) == 1
    one = fuse_adapters(folders, weights=WEIGHTS, out=tmp_path / "one").folder / "adapter_model.safetensors"
    two = fuse_adapters(folders[::-1], weights=WEIGHTS[::-1], out=tmp_path / "two").folder / one.name
    assert one.read_bytes() == two.read_bytes()
    # So are those that differ in a setting alone.
    pair = [make(tmp_path / "d"), make(tmp_path / "e", lora_alpha=3)]
    one_of = [
        fuse_adapters(order, out=tmp_path / f"f{n}").folder / one.name for n, order in enumerate((pair, pair[::-1]))
    ]
    assert one_of[0].read_bytes() == one_of[1].read_bytes()
    assert load_file(one)["base_model.model.z"][-1].item() == pytest.approx(0.3 * 1 + 0.2 * 2)


def test_svd_is_exact_where_its_rank_is_enough(three: list[Path], tmp_path: Path) -> None:
    done = fuse_adapters(three, method="svd", rank=6, weights=WEIGHTS, out=tmp_path / "fused")
    assert_equal(deltas(done.folder), exact(three, WEIGHTS))
    assert done.error.relative < 1e-14
    lower = fuse_adapters(three, method="svd", weights=WEIGHTS, out=tmp_path / "lower")
    assert set(lower.ranks.values()) == {3, 1}
    wanted = exact(three, WEIGHTS)
    lost = sum(torch.linalg.svdvals(delta)[3:].square().sum() for delta in wanted.values()) ** 0.5
    assert lower.error.distance == pytest.approx(float(lost), rel=1e-9)
    size = sum(delta.square().sum() for delta in wanted.values()) ** 0.5
    assert lower.error.size == pytest.approx(float(size), rel=1e-12)


def test_fedex_is_exact_in_one_folder_or_in_two(three: list[Path], tmp_path: Path) -> None:
    stacked = fuse_adapters(three, method="fedex", weights=WEIGHTS, out=tmp_path / "stacked")
    assert_equal(deltas(stacked.folder), exact(three, WEIGHTS))
    apart = fuse_adapters(three, method="fedex", residual="apart", weights=WEIGHTS, out=tmp_path / "apart")
    own, rest = deltas(apart.folder), deltas(apart.folder / "residual")
    # Modules of one adapter only have no rest.
    assert {name: own[name] + rest.get(name, 0) for name in own}.keys() == exact(three, WEIGHTS).keys()
    assert_equal({name: own[name] + rest.get(name, 0) for name in own}, exact(three, WEIGHTS))
    mean = fuse_adapters(three, method="average", weights=WEIGHTS, out=tmp_path / "average")
    assert_equal(own, deltas(mean.folder))
    assert mean.error.relative > 0.3
    assert apart.error.relative < 1e-14
    assert apart.notes[-1] == "exact together with the adapter in residual/, which belongs into the base model"


def test_the_error_is_that_of_what_was_saved(tmp_path: Path) -> None:
    folders = [make(tmp_path / name, seed, dtype=torch.bfloat16, lora_alpha=3) for seed, name in enumerate("ab")]
    done = fuse_adapters(folders, out=tmp_path / "fused")
    assert load_file(done.folder / "adapter_model.safetensors").popitem()[1].dtype == torch.bfloat16
    wanted, found = exact(folders, [0.5, 0.5]), deltas(done.folder)
    distance = sum((found[name] - wanted[name]).square().sum() for name in wanted) ** 0.5
    assert done.error.distance == pytest.approx(float(distance), rel=1e-9)
    assert 1e-4 < done.error.relative < 1e-2
    wide = fuse_adapters(folders, dtype="float32", out=tmp_path / "wide")
    assert wide.error.relative < 1e-7
    assert wide.num_bytes > done.num_bytes
    bare = fuse_adapters(folders, measures=False, hashes=False, out=tmp_path / "bare")
    assert bare.errors == {}
    assert {a["digest"] for a in json.loads((bare.folder / "fusion.json").read_text())["adapters"]} == {""}
    assert "not computed" in (bare.folder / "README.md").read_text()


@pytest.mark.parametrize("method", RULES.names())
def test_every_rule_for_tensors_fuses_the_changes(three: list[Path], tmp_path: Path, method: str) -> None:
    done = fuse_adapters(three, method=method, out=tmp_path / "fused")
    assert max(done.ranks.values()) <= 3
    found = deltas(done.folder)
    full = {
        name: torch.stack([deltas(f).get(name, torch.zeros(WIDTH, WIDTH).double()) for f in three]) for name in found
    }
    if method == "median":
        for name, stack in full.items():
            u, s, vh = torch.linalg.svd(stack.median(0).values)
            torch.testing.assert_close(found[name], (u[:, :3] * s[:3]) @ vh[:3], rtol=0, atol=1e-9)
    if method in ("mean", "task_arithmetic"):
        svd = fuse_adapters(three, method="svd", out=tmp_path / "svd")
        assert_equal(found, deltas(svd.folder))
    if method == "krum":
        # Whole adapters are compared, by all their changes together.
        # Two are nearest to each other, and the first of them counts: the order is that of their content.
        order = sorted(three, key=lambda folder: Adapter(folder).beginning)
        names, nothing = sorted(exact(three, WEIGHTS)), torch.zeros(WIDTH, WIDTH).double()
        flat = [torch.cat([deltas(folder).get(name, nothing).flatten() for name in names]) for folder in order]
        distances = torch.stack([torch.stack([(one - two).square().sum() for two in flat]) for one in flat])
        chosen = RULES.get("krum")().reweigh(distances, torch.ones(3).double()).argmax()
        assert_equal(found, deltas(order[int(chosen)]))


def test_rules_for_tensors_on_the_factors_as_peft_combines_them(tmp_path: Path) -> None:
    folders = [make(tmp_path / "a", 0, lora_alpha=2), make(tmp_path / "b", 1, lora_alpha=2)]
    done = fuse_adapters(folders, method="mean", on="factors", out=tmp_path / "fused")
    average = fuse_adapters(folders, method="average", out=tmp_path / "average")
    assert_equal(deltas(done.folder), deltas(average.folder))
    ties = fuse_adapters(folders, method="ties", on="factors", keep_fraction=1.0, out=tmp_path / "ties")
    one, two = (load_file(f / "adapter_model.safetensors") for f in folders)
    key = STEM.format(0, "q_proj") + ".lora_A.weight"
    agree = one[key] * two[key] > 0
    larger = torch.where(one[key].abs() > two[key].abs(), one[key], two[key])
    wanted = torch.where(agree, (one[key] + two[key]) / 2, larger)
    torch.testing.assert_close(load_file(ties.folder / "adapter_model.safetensors")[key], wanted)


def test_patterns_of_ranks_and_alphas_are_read_and_written(tmp_path: Path) -> None:
    pattern = {"rank_pattern": {"layers.0.self_attn.q_proj": 4, "v_proj": 1}, "alpha_pattern": {".*v_proj": 7}}
    odd = make(tmp_path / "odd", 0, **pattern)
    tensors = load_file(odd / "adapter_model.safetensors")
    for layer in range(2):
        for target in ("q_proj", "v_proj"):
            rank = AdapterConfig.read(odd).rank_of(f"model.layers.{layer}.self_attn.{target}")
            assert rank == (1 if target == "v_proj" else 4 if layer == 0 else 2)
            stem = STEM.format(layer, target)
            tensors[f"{stem}.lora_A.weight"] = torch.randn(rank, WIDTH, dtype=torch.float64)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(WIDTH, rank, dtype=torch.float64)
    save_file(tensors, odd / "adapter_model.safetensors")
    folders = [odd, make(tmp_path / "even", 1)]
    done = fuse_adapters(folders, weights=[3, 1], out=tmp_path / "fused")
    assert_equal(deltas(done.folder), exact(folders, [0.75, 0.25]))
    table = json.loads((done.folder / "adapter_config.json").read_text())
    # Two modules of one last name have different ranks: they are named whole.
    assert table["rank_pattern"]["model.layers.0.self_attn.q_proj"] == 6
    assert table["r"] == 3


def test_limits_on_layers_give_full_names(tmp_path: Path) -> None:
    only = make(tmp_path / "a", 0, layers=1, layers_to_transform=[0])
    both = make(tmp_path / "b", 1, target_modules=r".*\.(q|v)_proj")
    done = fuse_adapters([only, both], out=tmp_path / "fused")
    table = json.loads((done.folder / "adapter_config.json").read_text())
    assert table["target_modules"] == sorted(
        f"model.layers.{layer}.self_attn.{name}" for layer in (0, 1) for name in ("q_proj", "v_proj")
    )
    assert table["layers_to_transform"] is None
    same = [make(tmp_path / n, s, layers=1, layers_to_transform=[0]) for s, n in enumerate(("c", "d"))]
    table = json.loads((fuse_adapters(same, out=tmp_path / "e").folder / "adapter_config.json").read_text())
    assert (table["target_modules"], table["layers_to_transform"]) == (["q_proj", "v_proj"], [0])


def test_saved_heads_are_averaged_over_those_that_hold_them(tmp_path: Path) -> None:
    head = "base_model.model.score.weight"
    count = "base_model.model.score.count"
    folders = [
        make(
            tmp_path / "a", 0, extra={head: torch.full((3, 4), 1.0), count: torch.tensor(4)}, modules_to_save=["score"]
        ),
        make(
            tmp_path / "b", 1, extra={head: torch.full((3, 4), 4.0), count: torch.tensor(8)}, modules_to_save=["score"]
        ),
        make(tmp_path / "c", 2),
    ]
    done = fuse_adapters(folders, weights=[2, 1, 7], out=tmp_path / "fused")
    found = load_file(done.folder / "adapter_model.safetensors")
    torch.testing.assert_close(found[head], torch.full((3, 4), 2.0, dtype=torch.float64))
    assert (found[count].item(), found[count].dtype) == (5, torch.int64)
    assert json.loads((done.folder / "adapter_config.json").read_text())["modules_to_save"] == ["score"]
    assert done.notes == ("2 tensors are saved whole and were averaged, 2 of them over those that hold them",)


def test_embeddings_convolutions_and_biases_of_b(tmp_path: Path) -> None:
    def odd(seed: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64, generator=generator)

        return {
            "base_model.model.embed.lora_embedding_A": draw(2, 20),
            "base_model.model.embed.lora_embedding_B": draw(6, 2),
            "base_model.model.conv.lora_A.weight": draw(2, 3, 3, 3),
            "base_model.model.conv.lora_B.weight": draw(5, 2, 1, 1),
            "base_model.model.conv.lora_B.bias": draw(5),
        }

    targets = ["q_proj", "embed", "conv"]
    folders = [
        make(tmp_path / n, s, targets=("q_proj",), target_modules=targets, extra=odd(s), lora_bias=True)
        for s, n in enumerate("ab")
    ]
    done = fuse_adapters(folders, weights=WEIGHTS[:2], out=tmp_path / "fused")
    found = load_file(done.folder / "adapter_model.safetensors")
    one, two = odd(0), odd(1)
    for left, right in (
        ("embed.lora_embedding_B", "embed.lora_embedding_A"),
        ("conv.lora_B.weight", "conv.lora_A.weight"),
    ):
        keys = "base_model.model." + left, "base_model.model." + right
        product = [t[keys[0]].flatten(1) @ t[keys[1]].flatten(1) for t in (one, two, found)]
        torch.testing.assert_close(product[2], 2 * (0.625 * product[0] + 0.375 * product[1]))
    assert found["base_model.model.conv.lora_A.weight"].shape == (4, 3, 3, 3)
    assert found["base_model.model.conv.lora_B.weight"].shape == (5, 4, 1, 1)
    bias = "base_model.model.conv.lora_B.bias"
    torch.testing.assert_close(found[bias], 2 * (0.625 * one[bias] + 0.375 * two[bias]))
    # With this setting all have one.
    assert found[STEM.format(0, "q_proj") + ".lora_B.bias"].tolist() == [0.0] * WIDTH


def test_dora_is_averaged_and_nothing_else(tmp_path: Path) -> None:
    def dora(folder: Path, seed: int) -> Path:
        keys = [STEM.format(layer, target) for layer in range(2) for target in ("q_proj", "v_proj")]
        extra = {f"{key}.lora_magnitude_vector": torch.full((WIDTH,), float(seed)) for key in keys}
        return make(folder, seed, extra=extra, use_dora=True)

    folders = [dora(tmp_path / "a", 0), dora(tmp_path / "b", 4)]
    done = fuse_adapters(folders, method="average", weights=[3, 1], out=tmp_path / "fused")
    found = load_file(done.folder / "adapter_model.safetensors")
    assert found[STEM.format(0, "q_proj") + ".lora_magnitude_vector"].tolist() == [1.0] * WIDTH
    assert json.loads((done.folder / "adapter_config.json").read_text())["use_dora"] is True
    assert done.notes == ("DoRA: magnitudes were averaged; the error is of B A alone",)
    first = min(folders, key=lambda folder: Adapter(folder).beginning)
    assert refused(ModelError, folders, tmp_path) == (
        f"DoRA adapters have no sum: each rescales the base's whole weight\n  where: {first}\n"
        "  fix:   use the rule average, or merge each into its base and fuse the checkpoints"
    )


def test_ranks_that_add_up_to_more_than_the_weight_has(tmp_path: Path) -> None:
    folders = [make(tmp_path / f"{n}", n, r=5) for n in range(4)]
    done = fuse_adapters(folders, out=tmp_path / "fused")
    assert set(done.ranks.values()) == {WIDTH}
    assert_equal(deltas(done.folder), exact(folders, [0.25] * 4))


def test_what_is_written_beside_the_tensors(three: list[Path], tmp_path: Path) -> None:
    done = fuse_adapters(three, method="svd", rank=2, weights=WEIGHTS, out=tmp_path / "fused")
    assert sorted(path.name for path in done.folder.iterdir()) == [
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "fusion.json",
    ]
    facts = json.loads((done.folder / "fusion.json").read_text())
    assert (facts["method"], facts["settings"], facts["base_model"]) == ("svd", {"rank": 2}, "tiny")
    assert {a["name"]: (a["weight"], a["digest"]) for a in facts["adapters"]} == {
        str(path): (weight, Adapter(path).digest) for path, weight in zip(three, WEIGHTS, strict=True)
    }
    assert facts["relative_error"] == done.error.relative
    card = (done.folder / "README.md").read_text()
    assert card.startswith('---\nbase_model: "tiny"\nlibrary_name: peft\ntags:\n- fedfuse\n- lora\n---\n')
    assert f"| {three[1]} | 0.3 | 3 | 5 (rsLoRA) | `{Adapter(three[1]).digest}` |" in card
    # The file is one that any reader of the format opens, and its header says so to programs that load models.
    assert PayloadFile(done.folder / "adapter_model.safetensors")
    raw = (done.folder / "adapter_model.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header["__metadata__"] == {"format": "pt"}


# --- names on the hub


def test_names_on_the_hub_are_fetched(three: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    asked = []

    def snapshot(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append((name, revision))
        if name == "someone/gone":
            raise OSError("not found\nmore")
        return str(three[0])

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    done = fuse_adapters(["someone/lora@v1", three[1]], out=tmp_path / "fused")
    assert asked == [("someone/lora", "v1")]
    assert_equal(deltas(done.folder), exact(three[:2], [0.5, 0.5]))
    with pytest.raises(ArtifactError) as caught:
        fuse_adapters(["someone/gone"], out=tmp_path / "never")
    assert str(caught.value) == (
        "there is no such path, and the hub did not give it: not found\n  where: someone/gone\n  fix:   check the path"
    )


# --- all rules beside each other


def test_comparing_all_rules(three: list[Path]) -> None:
    rows = compare_rules(three, weights=WEIGHTS, rank=2)
    by_name = {row.method: row for row in rows}
    assert {row.method for row in rows} == {"flora", "average", "svd", "fedex", *RULES.names()}
    errors = [row.error.relative for row in rows if row.error is not None]
    assert errors == sorted(errors)
    assert rows[0].error is not None
    assert {rows[0].method, rows[1].method} == {"flora", "fedex"}
    assert by_name["svd"].largest_rank == 2
    assert by_name["flora"].num_parameters == sum(2 * WIDTH * rank for rank in (6, 6, 5, 5, 1, 1))
    (bad,) = compare_rules(three[:1], methods=["krum"], rank=WIDTH)
    assert bad.error is None
    assert "the rank 12 is not low" in bad.reason


def test_a_slip_in_the_name_of_a_folder_asks_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path / "adapters" / "a")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArtifactError) as caught:
        fuse_adapters(["adapters/a", "adapters/typo"], out="fused")
    assert caught.value.what == "there is no adapter_config.json"
