"""Adapters that cannot be fused: one clear message each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import fedfuse
from adapter_folders import (
    STEM,
    WIDTH,
    make,
    make_three,
    refused,
    save_base,
)
from fedfuse.core.errors import ArtifactError, ConfigError, FedfuseError, ModelError, RegistryError
from fedfuse.fusing import fuse_adapters


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    """Adapters that differ in rank, alpha, rsLoRA and targets."""
    return make_three(tmp_path)


def test_no_adapters_and_weights_that_do_not_fit(three: list[Path], tmp_path: Path) -> None:
    assert refused(ConfigError, [], tmp_path) == (
        "there is nothing to fuse\n  where: paths\n  fix:   give at least one adapter"
    )
    assert refused(ConfigError, three, tmp_path, weights=[1, 2]) == (
        "there are 2 weights for 3 adapters\n  where: weights\n  fix:   give one per adapter"
    )
    assert refused(ConfigError, three, tmp_path, weights=[1, -2, 3]) == (
        "-2.0 is no weight\n  where: weights\n  fix:   give numbers that are 0 or more"
    )
    assert "nan is no weight" in refused(ConfigError, three, tmp_path, weights=[1, float("nan"), 3])
    assert refused(ConfigError, three, tmp_path, weights=[0, 0, 0]) == (
        "the weights sum to 0.0\n  where: weights\n  fix:   give at least one a weight above 0"
    )


def test_other_base_models(tmp_path: Path) -> None:
    folders = [make(tmp_path / "a"), make(tmp_path / "b", base_model_name_or_path="other", revision="v2")]
    assert refused(ArtifactError, folders, tmp_path) == (
        f"the adapters have different base models: {folders[1]} has other@v2, {folders[0]} has tiny\n"
        f"  where: {folders[1] / 'adapter_config.json'}\n"
        "  fix:   fuse adapters of one base model; if both names mean the same one, give it as base_model"
    )
    done = fuse_adapters(folders, base_model="tiny", out=tmp_path / "fused")
    assert json.loads((done.folder / "adapter_config.json").read_text())["base_model_name_or_path"] == "tiny"
    wide = make(tmp_path / "c", targets=("q_proj",), layers=1)
    tensors = load_file(wide / "adapter_model.safetensors")
    tensors[STEM.format(0, "q_proj") + ".lora_B.weight"] = torch.zeros(WIDTH + 1, 2)
    save_file(tensors, wide / "adapter_model.safetensors")
    assert refused(ArtifactError, [folders[0], wide], tmp_path) == (
        f'"model.layers.0.self_attn.q_proj" is 13x12 in {wide} and 12x12 in {folders[0]}\n  where: {wide}\n'
        "  fix:   fuse adapters of one base model and one set of classes"
    )


def test_missing_modules(tmp_path: Path) -> None:
    whole = make(tmp_path / "whole")
    lacking = make(tmp_path / "lacking", drop="layers.1.self_attn.v_proj")
    assert refused(ArtifactError, [whole, lacking], tmp_path) == (
        f'{lacking} has no tensors of "model.layers.1.self_attn.v_proj", which its settings name and {whole} has\n'
        f"  where: {lacking}\n  fix:   the file is not whole: copy it again, or save it again by PEFT"
    )
    key = STEM.format(0, "q_proj")
    no_left = make(tmp_path / "no_left", drop="layers.0.self_attn.q_proj.lora_B")
    assert refused(ArtifactError, [no_left], tmp_path) == (
        f'the adapter has "{key}.lora_A.weight" without its B\n  where: {no_left}\n'
        "  fix:   the file is not whole: copy it again"
    )
    no_right = make(tmp_path / "no_right", drop="layers.0.self_attn.q_proj.lora_A")
    assert refused(ArtifactError, [no_right], tmp_path) == (
        f'the adapter has "{key}.lora_B.weight" without its A\n  where: {no_right}\n'
        "  fix:   the file is not whole: copy it again"
    )
    nothing = make(tmp_path / "nothing", targets=(), extra={"base_model.model.score.weight": torch.ones(2)})
    assert "the adapter has no LoRA tensors" in refused(ArtifactError, [nothing], tmp_path)
    head = {"base_model.model.score.weight": torch.ones(2, 2)}
    with_head = make(tmp_path / "with_head", extra=head, modules_to_save=["score"])
    without = make(tmp_path / "without", modules_to_save=["score"])
    assert f'{without} has no tensors of "base_model.model.score.weight", which its settings name' in refused(
        ArtifactError, [with_head, without], tmp_path
    )


def test_nan_in_one_adapter(three: list[Path], tmp_path: Path) -> None:
    tensors = load_file(three[1] / "adapter_model.safetensors")
    key = STEM.format(1, "v_proj") + ".lora_B.weight"
    tensors[key][2, 1] = float("nan")
    save_file(tensors, three[1] / "adapter_model.safetensors")
    for method in ("flora", "average", "ties"):
        assert refused(ArtifactError, three, tmp_path, method=method) == (
            f'the adapter holds NaN or infinity in "{key}"\n  where: {three[1]}\n'
            "  fix:   its training has failed: leave it out, or train it again with a lower learning rate"
        )


def test_ranks_that_are_not_low(three: list[Path], tmp_path: Path) -> None:
    for rank in (WIDTH, WIDTH + 1):
        folder = make(tmp_path / f"{rank}", r=rank)
        assert refused(ArtifactError, [folder], tmp_path) == (
            f'the rank {rank} of "model.layers.0.self_attn.q_proj" is not below the dimensions of its weight, 12 x 12\n'
            f"  where: {folder}\n  fix:   train with a lower rank, or merge it into its base and fuse the checkpoints"
        )
    for method in ("svd", "ties"):
        assert refused(ModelError, three, tmp_path, method=method, rank=12) == (
            'the rank 12 is not low for "model.layers.0.self_attn.k_proj", which is 12 x 12\n  where: rank\n'
            "  fix:   give a rank below 12"
        )
    assert refused(ConfigError, three, tmp_path, method="svd", rank=0) == (
        "rank is 0\n  where: rule.rank\n  fix:   give at least 1"
    )
    assert refused(ConfigError, three, tmp_path, method="flora", rank=4) == (
        'the rule "flora" chooses no rank\n  where: rank\n  fix:   leave rank out, or use svd: the best of a rank'
    )
    other = make(tmp_path / "other", r=3)
    table = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(table | {"r": 4}))
    assert refused(ArtifactError, [other], tmp_path) == (
        f'"model.layers.0.self_attn.q_proj" has rank 3, its settings say 4\n  where: {other}\n'
        "  fix:   settings and tensors are of different adapters: copy both again"
    )


def changed(folder: Path, **settings: Any) -> Path:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings), encoding="utf-8")
    return folder


def test_kinds_of_adapters_that_have_no_sum(tmp_path: Path) -> None:
    folder = make(tmp_path / "a")
    where = folder / "adapter_config.json"
    changed(folder, peft_type="IA3")
    assert refused(ArtifactError, [folder], tmp_path) == (
        f"the adapter is of the PEFT kind 'IA3'\n  where: {where}\n"
        "  fix:   fedfuse fuses LORA; merge others into their base and fuse the checkpoints"
    )
    changed(folder, peft_type="LORA", init_lora_weights="pissa_niter_4")
    assert refused(ArtifactError, [folder], tmp_path) == (
        f'the adapter was started by "pissa_niter_4", which changes the base model too\n  where: {where}\n'
        "  fix:   save it as plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=...)"
    )
    changed(folder, init_lora_weights=True, use_qalora=True)
    assert refused(ArtifactError, [folder], tmp_path) == (
        f'the adapter uses "use_qalora", with which its change is not B times A\n  where: {where}\n'
        "  fix:   merge it into its base and fuse the checkpoints"
    )
    strange = make(tmp_path / "b", extra={"base_model.model.x.lora_diag": torch.ones(2)})
    assert refused(ArtifactError, [strange], tmp_path) == (
        f'the adapter has "base_model.model.x.lora_diag", which is no LoRA\n  where: {strange}\n'
        "  fix:   merge it into its base and fuse those"
    )


def test_settings_of_which_there_can_be_one_only(tmp_path: Path) -> None:
    folders = [make(tmp_path / "a", alora_invocation_tokens=[1]), make(tmp_path / "b")]
    assert refused(ArtifactError, folders, tmp_path) == (
        f'the adapters differ in "alora_invocation_tokens": {folders[1]} has None, {folders[0]} has [1]\n'
        f"  where: {folders[1] / 'adapter_config.json'}\n  fix:   fuse adapters that agree in it"
    )
    changed(folders[0], alora_invocation_tokens=None, task_type="SEQ_CLS")
    assert refused(ArtifactError, folders, tmp_path) == (
        f"the adapters are for different tasks: {folders[0]}: SEQ_CLS, {folders[1]}: CAUSAL_LM\n  where: task_type\n"
        "  fix:   fuse adapters of one task"
    )
    head = {"base_model.model.model.layers.0.self_attn.q_proj.weight": torch.ones(WIDTH, WIDTH)}
    whole = make(tmp_path / "c", targets=("v_proj",), extra=head, modules_to_save=["q_proj"])
    assert refused(ArtifactError, [folders[1], whole], tmp_path) == (
        f'"model.layers.0.self_attn.q_proj" has an adapter in {folders[1]} and is saved whole in {whole}\n'
        f"  where: {folders[1]}\n  fix:   fuse adapters that treat it alike"
    )


def test_folders_that_are_no_adapters(three: list[Path], tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert refused(ArtifactError, [empty], tmp_path) == (
        f"there is no adapter_config.json\n  where: {empty}\n  fix:   name a folder that save_pretrained of PEFT wrote"
    )
    (three[0] / "adapter_model.safetensors").unlink()
    assert refused(ArtifactError, three, tmp_path) == (
        f"there is no adapter_model.safetensors\n  where: {three[0]}\n"
        "  fix:   save it as safetensors: load it with PEFT, then save_pretrained(folder)"
    )
    (three[0] / "adapter_model.bin").write_bytes(b"\x80")
    assert refused(ArtifactError, three, tmp_path) == (
        f"there is only adapter_model.bin, a pickle that may run code when it is read\n  where: {three[0]}\n"
        "  fix:   save it as safetensors: load it with PEFT, then save_pretrained(folder)"
    )
    (three[1] / "adapter_model.safetensors").write_bytes(b"nothing")
    assert "the bytes are not a payload" in refused(FedfuseError, three[1:], tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "adapter_config.json is broken: Expecting"),
        ("[]", "adapter_config.json is broken: it is no table"),
        ('{"peft_type": "LORA"}', "adapter_config.json is broken: r is None"),
        ('{"peft_type": "LORA", "r": true}', "adapter_config.json is broken: r is True"),
        ('{"peft_type": "LORA", "r": 2, "lora_alpha": "x"}', "adapter_config.json is broken: lora_alpha is 'x'"),
        (
            '{"peft_type": "LORA", "r": 2, "lora_alpha": 1, "rank_pattern": {"q": 0}}',
            "adapter_config.json is broken: rank_pattern is {'q': 0}",
        ),
        (
            '{"peft_type": "LORA", "r": 2, "lora_alpha": 1, "rank_pattern": {"(": 1}}',
            "adapter_config.json is broken: '(' is no pattern",
        ),
    ],
)
def test_settings_that_are_broken(tmp_path: Path, content: str, said: str) -> None:
    folder = make(tmp_path / "a")
    (folder / "adapter_config.json").write_text(content)
    assert refused(ArtifactError, [folder], tmp_path).startswith(said)


def test_rules_and_settings_that_there_are_not(three: list[Path], tmp_path: Path) -> None:
    assert refused(RegistryError, three, tmp_path, method="flroa").startswith(
        'there is no rule "flroa" for adapters\n  fix:   did you mean "flora"? known: average, dare, fedex, flora, '
    )
    assert 'unknown setting "no_such"' in refused(ConfigError, three, tmp_path, no_such=1)
    assert refused(ConfigError, three, tmp_path, method="ties", on="bits") == (
        'on is "bits"\n  where: rule.on\n  fix:   give deltas or factors'
    )
    assert refused(ConfigError, three, tmp_path, method="ties", on="factors", rank=2) == (
        'the rule "ties" on factors chooses no rank\n  where: rank\n  fix:   leave rank out, or on=factors'
    )
    assert refused(ConfigError, three, tmp_path, method="merge") == (
        'the rule "merge" changes the base model, and there is none\n  where: base\n'
        "  fix:   name the base model's folder"
    )
    assert refused(ConfigError, three, tmp_path, base="x") == (
        'the rule "flora" does not look at a base\n  where: base\n  fix:   leave base out'
    )
    assert refused(ConfigError, three, tmp_path, dtype="float") == (
        'there is no dtype "float"\n  where: dtype\n'
        '  fix:   did you mean "float64"? known: auto, bfloat16, float16, float32, float64'
    )
    with pytest.raises(ConfigError, match="the result would lie on what it is made of"):
        fuse_adapters(three, out=three[0])


def test_bases_that_are_not_the_adapters(three: list[Path], tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    other = make(tmp_path / "other", targets=("o_proj",), layers=1)
    assert refused(ModelError, [other], tmp_path, method="merge", base=tmp_path / "base") == (
        'the base model has no weight of "model.layers.0.self_attn.o_proj"\n'
        f"  where: {tmp_path / 'base'}\n  fix:   name the base model that the adapters were trained on"
    )
    save_file({"q_proj.weight": torch.zeros(3, 4)}, tmp_path / "small.safetensors")
    one = make(tmp_path / "one", targets=("q_proj",), layers=1)
    assert refused(ModelError, [one], tmp_path, method="merge", base=tmp_path / "small.safetensors") == (
        'the base model has (3, 4) as "model.layers.0.self_attn.q_proj", the adapters change (12, 12)\n'
        f"  where: {tmp_path / 'small.safetensors'}\n  fix:   name the base model that the adapters were trained on"
    )


def test_numbers_that_do_not_fit_the_result(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", lora_alpha=1e6)
    assert refused(ModelError, [folder], tmp_path, dtype="float16").endswith(
        "does not fit float16\n  where: dtype\n  fix:   give dtype=float32"
    )


def test_adapters_and_whole_models_do_not_mix(three: list[Path], tmp_path: Path) -> None:
    save_base(tmp_path / "base")
    with pytest.raises(ArtifactError) as caught:
        fedfuse.fuse([three[0], tmp_path / "base"], out=tmp_path / "never")
    assert str(caught.value) == (
        f"adapters and whole models do not mix\n  where: {tmp_path / 'base'}\n"
        "  fix:   merge the adapters into their base first"
    )
    with pytest.raises(ConfigError, match="whole models have no rank"):
        fedfuse.fuse([tmp_path / "base"] * 2, rank=2, out=tmp_path / "never")
