"""Foundation models: what is trained, what is stored, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from fedfuse.core.artifact import Artifact, ModelSpec, detached_state, load_state
from fedfuse.core.errors import ConfigError, DataError, ModelError
from fedfuse.core.examples import Examples
from fedfuse.core.seeding import Rng
from fedfuse.models.ensemble import Ensemble
from fedfuse.models.family import spec as family_spec
from fedfuse.models.foundation import lora_layout, with_rank
from fedfuse.models.foundation.base import PLACES, _pristine
from fedfuse.ops.lora import Factors
from fedfuse.training import LocalSGD, evaluate, train

pytest.importorskip("transformers")
pytest.importorskip("peft")

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
LLAMA = {"model_type": "llama", **SIZES}
BERT = {"model_type": "bert", **SIZES}


def spec(base: dict[str, Any] = BERT, *, length: int = 8, num_classes: int = 3, **settings: Any) -> ModelSpec:
    return family_spec(
        "transformers", {"config": base, **settings}, input_shape=(length,), num_classes=num_classes, seed=1
    )


def tokens(n: int = 6, length: int = 8) -> torch.Tensor:
    return torch.randint(0, 50, (n, length), generator=torch.Generator().manual_seed(0)).float()


def num_trained(**peft: Any) -> int:
    return sum(t.numel() for t in spec(peft=peft).build().state_dict().values())


HEAD = 16 * 3 + 3


class TestWhatIsTrained:
    def test_lora_on_queries_and_values(self) -> None:
        # Two layers, two projections, A of rank x 16 and B of 16 x rank.
        assert num_trained(kind="lora", rank=4) == 2 * 2 * (4 * 16 + 16 * 4) + HEAD

    def test_lora_in_one_layer(self) -> None:
        assert num_trained(kind="lora", rank=4, layers=[1]) == 2 * (4 * 16 + 16 * 4) + HEAD

    def test_dora_also_has_magnitudes(self) -> None:
        assert num_trained(kind="dora", rank=4) == num_trained(kind="lora", rank=4) + 2 * 2 * 16

    def test_ia3_scales_keys_values_and_the_feed_forward_input(self) -> None:
        # output.dense is found twice in a layer of BERT: in attention, 16 wide, and after the feed-forward, 24 wide.
        assert num_trained(kind="ia3") == 2 * (16 + 16 + 16 + 24) + HEAD

    def test_prompts_are_tokens_before_the_input(self) -> None:
        assert num_trained(kind="prompt", num_virtual_tokens=5) == 5 * 16 + HEAD

    def test_prefixes_are_keys_and_values_of_every_layer(self) -> None:
        assert num_trained(kind="prefix", num_virtual_tokens=5) == 5 * 2 * 2 * 16 + HEAD

    def test_the_head_alone(self) -> None:
        assert num_trained(kind="head") == HEAD

    def test_biases_alone(self) -> None:
        module = spec(peft={"kind": "bias"}).build()
        names = [name for name in module.state_dict() if not name.startswith("head.")]
        assert names
        assert all(name.endswith(".bias") for name in names)

    def test_everything(self) -> None:
        module = spec(peft={"kind": "full"}).build()
        assert set(module.state_dict()) == set(dict(module.named_parameters()))

    def test_rslora_divides_by_the_root_of_the_rank(self) -> None:
        plain, stable = (spec(peft={"kind": kind, "rank": 4, "lora_alpha": 8}) for kind in ("lora", "rslora"))
        name = next(iter(lora_layout(plain).modules))
        assert lora_layout(plain).modules[name].scale == 2.0
        assert lora_layout(stable).modules[name].scale == 4.0

    @pytest.mark.parametrize("kind", ["full", "lora", "rslora", "dora", "ia3", "prompt", "prefix", "bias", "head"])
    def test_training_moves_what_is_in_the_state_and_nothing_else(self, kind: str) -> None:
        owner = spec(peft={"kind": kind, "rank": 4})
        module = owner.build()
        hidden = {n: p.detach().clone() for n, p in module.named_parameters() if n not in module.state_dict()}
        before = detached_state(module)
        examples = Examples(tokens(), torch.tensor([0, 1, 2, 0, 1, 2]))
        settings = LocalSGD(num_epochs=2, batch_size=3, optimizer="adamw", learning_rate=0.1)
        train(module, examples, settings, rng=Rng(0), device=torch.device("cpu"))
        assert any(not torch.equal(before[n], t) for n, t in module.state_dict().items())
        assert all(torch.equal(hidden[n], p) for n, p in module.named_parameters() if n in hidden)
        # Others that share the base see nothing of it.
        assert all(torch.equal(before[n], t) for n, t in owner.build().state_dict().items())

    def test_a_state_comes_back_inside_of_another_module_too(self) -> None:
        owner = spec(peft={"kind": "lora", "rank": 2})
        first, second = owner.build().eval(), owner.build().eval()
        with torch.no_grad():
            for parameter in first.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3)
        pair = Ensemble([first, second], combine="mean_logits", num_classes=3)
        other = Ensemble([owner.build().eval(), owner.build().eval()], combine="mean_logits", num_classes=3)
        load_state(other, detached_state(pair))
        assert torch.equal(other(tokens()), pair(tokens()))

    def test_frozen_weights_are_in_memory_once(self) -> None:
        owner = spec(peft={"kind": "lora", "rank": 2})
        first, second = owner.build(), owner.build()
        for (name, one), (_, two) in zip(first.named_parameters(), second.named_parameters(), strict=True):
            assert (one.data_ptr() == two.data_ptr()) == (not one.requires_grad), name


class TestTexts:
    @pytest.mark.parametrize("pooling", ["mean", "first", "last"])
    @pytest.mark.parametrize("base", [BERT, LLAMA], ids=["bert", "llama"])
    def test_padding_changes_nothing(self, base: dict[str, Any], pooling: str) -> None:
        module = spec(base, length=12, pooling=pooling).build().eval()
        short = tokens(4, 5)
        padded = torch.cat([short, torch.full((4, 7), -1.0)], 1)
        beside = torch.cat([padded, tokens(1, 12)])
        alone, together = module(short), module(beside)[:4]
        torch.testing.assert_close(together, alone, atol=1e-6, rtol=1e-5)

    def test_a_text_without_tokens_is_no_failure(self) -> None:
        assert torch.isfinite(spec().build().eval()(torch.full((2, 8), -1.0))).all()

    def test_mean_pooling_by_hand(self) -> None:
        module: Any = spec().build().eval()
        ids = torch.tensor([[3, 4, 5]])
        hidden = module.net(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        x = torch.tensor([[3.0, 4.0, 5.0, -1.0, -1.0]])
        torch.testing.assert_close(module.features(x), hidden.mean(1))

    @pytest.mark.parametrize("base", [BERT, LLAMA], ids=["bert", "llama"])
    def test_a_sequence_classifier_is_that_of_transformers(self, base: dict[str, Any]) -> None:
        module: Any = spec(base, task="sequence_classifier").build().eval()
        ids = torch.tensor([[3, 4, 5, 6]])
        wanted = module.net(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        torch.testing.assert_close(module(ids.float()), wanted)
        assert module.features(ids.float()).shape == (1, 16)

    def test_a_token_that_the_model_does_not_know(self) -> None:
        with pytest.raises(DataError) as caught:
            spec().build()(torch.full((1, 8), 50.0))
        assert str(caught.value) == (
            "token 50 is beyond the model's vocabulary of 50\n"
            "  where: data.tokenizer\n"
            "  fix:   use the tokenizer that belongs to the model"
        )


class TestCausalLM:
    def lm(self, **settings: Any) -> Any:
        return spec(LLAMA, length=16, task="causal_lm", **settings).build().eval()

    def test_the_loss_is_that_of_the_completion(self) -> None:
        module = self.lm()
        ids = torch.tensor([[3, 4, 5, 6, 7]])
        logits = module.net(input_ids=ids).logits
        x = torch.tensor([[3.0, 4, 5, 6, 7, -1, -1, -1, 0, 0, 0, 1, 1, 0, 0, 0]])
        # Tokens 6 and 7 are learnt; each is predicted from the place before it.
        wanted = F.cross_entropy(logits[0, [2, 3]], ids[0, [3, 4]])
        torch.testing.assert_close(module.objective(x, torch.zeros(1)), wanted)

    def test_perplexity_is_over_all_tokens_not_over_batches(self) -> None:
        module = self.lm()
        gen = torch.Generator().manual_seed(1)
        ids = torch.randint(0, 50, (40, 8), generator=gen).float()
        flags = (torch.rand(40, 8, generator=gen) > 0.5).float()
        examples = Examples(torch.cat([ids, flags], 1), torch.zeros(40, dtype=torch.int64))
        seen = evaluate(module, examples)
        logits = module.net(input_ids=ids.long()).logits[:, :-1]
        chosen = flags[:, 1:] > 0
        wanted = F.cross_entropy(logits[chosen], ids[:, 1:][chosen].long())
        assert seen.loss == pytest.approx(wanted.item(), rel=1e-5)
        assert seen.metrics["perplexity"] == pytest.approx(wanted.exp().item(), rel=1e-5)
        assert seen.accuracy == (logits.argmax(-1) == ids[:, 1:])[chosen].double().mean().item()
        assert seen.confusion is None

    def test_nothing_to_learn_is_no_step(self) -> None:
        module = self.lm(peft={"kind": "lora", "rank": 2})
        loss = module.objective(torch.cat([tokens(2), torch.zeros(2, 8)], 1), torch.zeros(2))
        loss.backward()
        assert loss.item() == 0
        assert all(not p.grad.any() for p in module.parameters() if p.grad is not None)

    def test_greedy_answers_by_hand(self) -> None:
        module = self.lm()
        prompt = [3, 4, 5]
        module.net.config.eos_token_id = module.net.generation_config.eos_token_id = None
        wanted, ids = [], list(prompt)
        for _ in range(4):
            ids.append(int(module.net(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
            wanted.append(ids[-1])
        assert module.generate([prompt, [7]], 4)[0] == wanted
        module.net.config.eos_token_id = wanted[2]
        assert module.generate([prompt], 4) == [wanted[: wanted.index(wanted[2])]]

    @pytest.mark.parametrize("kind", ["lora", "prompt", "prefix"])
    def test_virtual_tokens_predict_nothing(self, kind: str) -> None:
        module = self.lm(peft={"kind": kind, "rank": 2})
        x = torch.cat([tokens(2), torch.ones(2, 8)], 1)
        assert module(x).shape == (2, 8, 50)


class TestLora:
    def test_factors_and_back(self) -> None:
        owner = spec(peft={"kind": "lora", "rank": 4, "lora_alpha": 8})
        layout = lora_layout(owner)
        generator = torch.Generator().manual_seed(0)
        state = {key: torch.randn(t.shape, generator=generator) for key, t in owner.build().state_dict().items()}
        factors = layout.factors(state)
        name, module = next(iter(layout.modules.items()))
        wanted = 2.0 * state[module.left_key].double() @ state[module.right_key].double()
        torch.testing.assert_close(factors[name].product(), wanted)
        back = layout.state(factors, state)
        assert set(back) == set(state)
        for key, tensor in back.items():
            torch.testing.assert_close(tensor, state[key])

    def test_a_change_of_the_base_is_the_adapter_folded_in(self) -> None:
        owner = spec(peft={"kind": "lora", "rank": 4})
        layout = lora_layout(owner)
        generator = torch.Generator().manual_seed(0)
        adapted, folded = owner.build().eval(), owner.build().eval()
        state = {
            key: t if key in layout.others else 0.3 * torch.randn(t.shape, generator=generator)
            for key, t in adapted.state_dict().items()
        }
        load_state(adapted, state)
        folded.add_to_base(layout.factors(state))  # type: ignore[operator]
        torch.testing.assert_close(folded(tokens()), adapted(tokens()), atol=1e-5, rtol=1e-5)
        assert not torch.allclose(owner.build().eval()(tokens()), adapted(tokens()), atol=1e-3)

    def test_weights_that_lie_on_their_side(self) -> None:
        gpt = {"model_type": "gpt2", "vocab_size": 50, "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
        owner = spec(gpt, peft={"kind": "lora", "rank": 2})
        layout = lora_layout(owner)
        ((_name, module),) = layout.modules.items()
        assert module.shape == (48, 16)
        adapted, folded = owner.build().eval(), owner.build().eval()
        state = {
            key: t if key in layout.others else 0.3 * torch.randn(t.shape, generator=torch.Generator().manual_seed(0))
            for key, t in adapted.state_dict().items()
        }
        load_state(adapted, state)
        folded.add_to_base(layout.factors(state))  # type: ignore[operator]
        torch.testing.assert_close(folded(tokens()), adapted(tokens()), atol=1e-5, rtol=1e-5)

    def test_another_rank_of_the_same_base(self) -> None:
        owner = spec(peft={"kind": "lora", "rank": 4})
        wide = lora_layout(with_rank(owner, 11))
        assert wide.rank == 11
        assert {m.scale for m in wide.modules.values()} == {1.0}

    def test_a_change_that_does_not_fit(self) -> None:
        module: Any = spec(peft={"kind": "lora", "rank": 4}).build()
        wrong = Factors(torch.zeros(5, 1).double(), torch.zeros(1, 16).double())
        name = "net.base_model.model.encoder.layer.0.attention.self.query"
        with pytest.raises(ModelError, match=r"a change of shape \(5, 16\) does not fit a weight of shape \(16, 16\)"):
            module.add_to_base({name: wrong})
        with pytest.raises(ModelError, match="the model has no such weight"):
            module.add_to_base({"net.nowhere": wrong})

    def test_a_model_without_lora(self) -> None:
        with pytest.raises(ConfigError) as caught:
            lora_layout(spec(peft={"kind": "head"}))
        assert str(caught.value) == (
            "the model has no LoRA adapter\n  where: model.peft\n  fix:   set model.peft to {kind: lora, rank: 8}"
        )


class TestFolders:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        module: Any = spec(LLAMA).build()
        module.net.config.pad_token_id = None
        module.net.save_pretrained(tmp_path / "base")
        return tmp_path / "base"

    def of(self, path: Path | str, **settings: Any) -> ModelSpec:
        settings = {"path": str(path), "peft": {"kind": "lora", "rank": 2}, **settings}
        return family_spec("transformers", settings, input_shape=(8,), num_classes=3, seed=1)

    def test_the_weights_of_the_folder_are_the_base(self, folder: Path) -> None:
        module: Any = self.of(folder).build()
        drawn: Any = spec(LLAMA).build()
        key = "layers.1.mlp.down_proj.weight"
        assert torch.equal(dict(module.net.base_model.model.named_parameters())[key], drawn.net.get_parameter(key))

    def test_fewer_layers_of_the_same_weights(self, folder: Path) -> None:
        module: Any = self.of(folder, config={"num_hidden_layers": 1}, peft={"kind": "full"}).build()
        assert len(module.net.layers) == 1

    def test_an_artifact_holds_the_adapter_and_finds_its_base(self, folder: Path, tmp_path: Path) -> None:
        owner = self.of(folder)
        module = owner.build().eval()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        artifact = Artifact.of(owner, detached_state(module))
        artifact.save(tmp_path / "artifact")
        # Rank 2 on two projections of two layers; head of 16 x 3.
        assert artifact.num_bytes == 4 * (2 * 2 * (2 * 16 + 16 * 2) + HEAD)
        program = (
            "import sys, json, torch, fedfuse\n"
            "model = fedfuse.load(sys.argv[1])\n"
            "print(json.dumps(model(torch.arange(16.0).view(2, 8)).tolist()))"
        )
        run = subprocess.run(
            [sys.executable, "-c", program, str(tmp_path / "artifact")], capture_output=True, text=True, timeout=120
        )
        assert run.returncode == 0, run.stderr
        wanted = module(torch.arange(16.0).view(2, 8))
        torch.testing.assert_close(torch.tensor(json.loads(run.stdout)), wanted, atol=1e-6, rtol=1e-6)

    def test_another_base_under_the_same_name_is_refused(self, folder: Path) -> None:
        owner = self.of(folder)
        other: Any = family_spec(
            "transformers", {"config": LLAMA, "peft": {"kind": "full"}}, input_shape=(8,), num_classes=3, seed=2
        ).build()
        other.net.config.pad_token_id = None
        other.net.save_pretrained(folder)
        _pristine.cache_clear()
        with pytest.raises(ModelError) as caught:
            owner.build()
        assert str(caught.value) == (
            "the base model here has other weights than the one that was agreed on\n"
            f"  where: model.path: {folder}\n"
            "  fix:   take the same version of the base model"
        )

    def test_a_base_that_lies_elsewhere_here(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        owner = self.of(folder)
        folder.rename(folder.with_name("moved"))
        (folder.parent / "models").mkdir()
        folder.with_name("moved").rename(folder.parent / "models" / "base")
        monkeypatch.setenv(PLACES, str(folder.parent / "models"))
        assert owner.build().state_dict()

    def test_no_such_folder(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError) as caught:
            self.of(tmp_path / "nowhere")
        assert str(caught.value) == (
            "there is no such folder\n"
            f"  where: model.path: {tmp_path / 'nowhere'}\n"
            f"  fix:   name a folder that save_pretrained wrote, or set {PLACES} to the folder where base models lie"
        )

    def test_weights_in_pickles_are_not_read(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
        with pytest.raises(ConfigError, match="there are no weights in safetensors"):
            self.of(folder)


class TestSettings:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (
                {"config": {}},
                (
                    "there is no model to start from\n"
                    "  where: model.path\n"
                    "  fix:   give path: a folder or a name on the hub, "
                    "or config: {model_type: llama, hidden_size: 64, ...}"
                ),
            ),
            (
                {"peft": {"kind": "lora", "rank": 16}},
                (
                    'the rank 16 is not low for "encoder.layer.0.attention.self.query", which is 16 x 16\n'
                    "  where: model.peft.rank\n"
                    "  fix:   give a rank below 16"
                ),
            ),
            (
                {"peft": {"kind": "lora", "rank": 4, "target_modules": ["querry"]}},
                (
                    'no linear module is called "querry"\n'
                    "  where: model.peft.target_modules\n"
                    "  fix:   some that there are: dense, key, query, value"
                ),
            ),
            (
                {"length": 40},
                (
                    "texts of 40 tokens are longer than the model's 32\n"
                    "  where: data.max_length\n"
                    "  fix:   set max_length to 32 or less"
                ),
            ),
            (
                {"base": LLAMA, "peft": {"kind": "bias"}},
                "the model has no biases\n  where: model.peft.kind\n  fix:   use kind: lora",
            ),
            (
                {"base": LLAMA, "length": 7, "task": "causal_lm"},
                (
                    "inputs of shape (7,) are no prompts with completions\n"
                    "  where: model.family\n"
                    "  fix:   use source: text with prompt_column and completion_column"
                ),
            ),
            (
                {"peft": {"kind": "lora", "rank": 0}},
                "rank is 0\n  where: model.peft.rank\n  fix:   give at least 1",
            ),
            (
                {"peft": {"dropout": 1.0}},
                "dropout is 1\n  where: model.peft.dropout\n  fix:   give a number in [0, 1)",
            ),
        ],
    )
    def test_one_clear_error(self, settings: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError) as caught:
            spec(**settings).build()
        assert str(caught.value) == message

    def test_a_kind_that_there_is_not(self) -> None:
        with pytest.raises(ConfigError, match=r"model\.peft\.kind"):
            spec(peft={"kind": "adapterfusion"})

    def test_an_unknown_architecture(self) -> None:
        with pytest.raises(ModelError, match="the base model cannot be built"):
            spec({"model_type": "no_such_model"})
