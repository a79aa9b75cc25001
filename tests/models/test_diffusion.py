"""Text-to-image models: losses and drawings by hand, what is trained, what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_pipelines import (
    LATENT,
    LENGTH,
    NUM_PIXELS,
    PIXELS,
    SCHEDULER,
    TEXT_ENCODER,
    TRANSFORMED,
    TWO_ENCODERS,
    UNET,
    WIDTH,
)
from torch import Tensor, nn

from fedfuse.core.artifact import Artifact, ModelSpec, detached_state
from fedfuse.core.errors import ConfigError, DataError, ModelError
from fedfuse.core.examples import Examples
from fedfuse.core.seeding import Rng
from fedfuse.data.captions import words_file
from fedfuse.models import spec
from fedfuse.models.foundation import lora_layout, text_to_image
from fedfuse.models.foundation.conditioning import Reader
from fedfuse.models.foundation.pipeline import _pristine, load_pipeline, pipeline_base, save_pipeline
from fedfuse.models.foundation.text_to_image import TextToImage

pytest.importorskip("diffusers")

LORA = {"kind": "lora", "rank": 2}
CAPTION = [1.0, 2.0, 3.0, -1.0, -1.0]


def pipeline_spec(config: Any = PIXELS, width: int = WIDTH, **settings: Any) -> ModelSpec:
    facts: dict[str, Any] = {"input_shape": (width,), "num_classes": 2, "seed": 3}
    return spec("diffusers", {"config": config, **settings}, **facts)


def model_of(config: Any = PIXELS, width: int = WIDTH, **settings: Any) -> TextToImage:
    module = pipeline_spec(config, width, **settings).build()
    assert isinstance(module, TextToImage)
    return module


def inputs(n: int, num_pixels: int = NUM_PIXELS) -> Tensor:
    pixels = torch.rand(n, num_pixels, generator=torch.Generator().manual_seed(0)) * 2 - 1
    return torch.cat([pixels, torch.tensor([CAPTION] * n)], 1)


class Fixed(nn.Module):
    """Predicts a multiple of the mean of the caption's hidden states, the same for every pixel."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.tensor(factor))

    def forward(self, noisy: Tensor, *, encoder_hidden_states: Tensor, **others: Any) -> tuple[Tensor]:
        return (self.factor * encoder_hidden_states.mean((1, 2))[:, None, None, None].expand_as(noisy),)


def silent(module: TextToImage) -> TextToImage:
    """The same with a network that predicts 0."""
    module.net = Fixed(0.0)
    return module


class TestObjective:
    def test_a_network_that_predicts_nothing_misses_all_the_noise(self) -> None:
        module, x = silent(model_of()), inputs(6)
        with Rng(1).ambient("training"):
            loss = module.objective(x, torch.zeros(6))
        with Rng(1).ambient("training"):
            torch.rand(6), torch.randint(10, (6,))
            noise = torch.randn(6, 1, 4, 4)
        assert loss.item() == pytest.approx(noise.square().mean().item(), rel=1e-6)

    def test_velocity_and_sample_by_hand(self) -> None:
        # Betas of 0.1: after step t, 0.9^(t + 1) of the picture's square is left.
        x = inputs(6)
        with Rng(1).ambient("training"):
            torch.rand(6)
            steps, noise = torch.randint(10, (6,)), torch.randn(6, 1, 4, 4)
        clean, left = x[:, :NUM_PIXELS].reshape(6, 1, 4, 4), (0.9 ** (steps + 1.0))[:, None, None, None]
        targets = {"v_prediction": left.sqrt() * noise - (1 - left).sqrt() * clean, "sample": clean}
        for kind, target in targets.items():
            module = silent(model_of({**PIXELS, "scheduler": {**SCHEDULER, "prediction_type": kind}}))
            with Rng(1).ambient("training"):
                loss = module.objective(x, torch.zeros(6))
            assert loss.item() == pytest.approx(target.square().mean().item(), rel=1e-5)

    def test_some_captions_are_left_out(self) -> None:
        seen: list[Tensor] = []
        for share in (0.0, 0.5):
            module = silent(model_of(caption_dropout=share))
            module.reader.register_forward_pre_hook(lambda _, captions: seen.append(captions[0]))
            with Rng(0).ambient("training"):
                module.objective(inputs(200), torch.zeros(200))
        never, half = ((captions < 0).all(1).double().mean().item() for captions in seen)
        assert never == 0
        assert 0.4 < half < 0.6
        assert seen[1][~(seen[1] < 0).all(1)].unique(dim=0).tolist() == [CAPTION]

    @pytest.mark.parametrize("config", [PIXELS, TRANSFORMED, TWO_ENCODERS], ids=["unet", "transformer", "two encoders"])
    def test_all_of_the_adapter_learns(self, config: Any) -> None:
        module = model_of(config, peft=LORA)
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if "lora_B" in name:
                    parameter.normal_()
        module.objective(inputs(3), torch.zeros(3)).backward()
        state = module.state_dict()
        assert state
        for name, parameter in module.named_parameters():
            assert (parameter.grad is not None and bool(parameter.grad.any())) == (name in state), name


class TestJudging:
    def test_a_network_that_predicts_nothing_explains_nothing(self) -> None:
        module, x = silent(model_of()), inputs(70)
        draw = Rng(0).child("judged noise").torch("noise")
        noise = torch.cat([torch.randn(64, 1, 4, 4, generator=draw), torch.randn(6, 1, 4, 4, generator=draw)])
        with Rng(5).ambient("whatever"):
            seen = module.judge(Examples(x, torch.zeros(70, dtype=torch.int64)))
        assert seen.loss == pytest.approx(noise.square().mean().item(), rel=1e-6)
        assert seen.accuracy == 0
        assert seen.metrics == {"denoising_loss": seen.loss, "noise_explained": 0.0}
        assert seen.confusion is None

    def test_times_are_spread_evenly(self) -> None:
        module = silent(model_of())
        seen: list[Tensor] = []
        add_noise = module._noising.add_noise

        def watched(clean: Tensor, noise: Tensor, steps: Tensor) -> Any:
            seen.append(steps)
            return add_noise(clean, noise, steps)

        module._noising.add_noise = watched
        module.judge(Examples(inputs(20), torch.zeros(20, dtype=torch.int64)))
        assert sorted(seen[0].tolist()) == sorted([*range(10), *range(10)])


class TestDrawing:
    def test_without_a_prediction_the_noise_is_scaled(self) -> None:
        # Each step divides by the root of what is left and multiplies by the next: they cancel but for the first.
        module, captions = silent(model_of(num_inference_steps=10)), torch.tensor([CAPTION] * 3)
        drawn = module.sample(captions, Rng(7))
        noise = torch.randn(3, 1, 4, 4, generator=Rng(7).torch("first noise"))
        torch.testing.assert_close(drawn, ((noise / 0.9**5 + 1) / 2).clamp(0, 1), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("scale", [1.0, 2.5])
    def test_one_guided_step_by_hand(self, scale: float) -> None:
        module = model_of(num_inference_steps=1, guidance_scale=scale)
        module.net = Fixed(3.0)
        drawn = module.sample(torch.tensor([CAPTION]), Rng(7))
        # One step begins at time 0, where 0.9 is left.
        noise = torch.randn(1, 1, 4, 4, generator=Rng(7).torch("first noise"))
        with torch.no_grad():
            asked, free = (module.reader(torch.tensor([c])).hidden.mean() for c in (CAPTION, [-1.0] * LENGTH))
            guess = 3 * (free + scale * (asked - free))
        clean = (noise - 0.1**0.5 * guess) / 0.9**0.5
        torch.testing.assert_close(drawn, ((clean + 1) / 2).clamp(0, 1), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("config", [PIXELS, TRANSFORMED, TWO_ENCODERS], ids=["unet", "transformer", "two encoders"])
    def test_it_hangs_on_the_seed_and_the_caption_alone(self, config: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        module = model_of(config, num_inference_steps=2).train()
        captions = torch.tensor([CAPTION, [4.0, 5.0, -1.0, -1.0, -1.0], CAPTION])
        drawn = module.sample(captions, Rng(1))
        assert module.training
        assert drawn.shape == (3, 1, 4, 4)
        assert float(drawn.min()) >= 0
        assert float(drawn.max()) <= 1
        torch.manual_seed(3)
        monkeypatch.setattr(text_to_image, "_AT_ONCE", 2)
        torch.testing.assert_close(module.sample(captions, Rng(1)), drawn, rtol=1e-4, atol=1e-5)
        assert not torch.equal(module.sample(captions, Rng(2)), drawn)
        assert not torch.equal(module.sample(captions.roll(1, 0), Rng(1)), drawn)
        x = torch.cat([torch.zeros(3, NUM_PIXELS), captions], 1)
        torch.testing.assert_close(module.draw(x, Rng(1)), drawn, rtol=1e-4, atol=1e-5)
        assert module(x).shape == (3, 1, 4, 4)

    def test_large_pictures_are_drawn_a_few_at_a_time(self) -> None:
        module = model_of()
        assert module._at_once == 64
        module.picture_shape = (3, 512, 512)
        assert module._at_once == 4

    def test_pictures_are_read_back(self) -> None:
        module, x = model_of(), inputs(2)
        assert torch.equal(module.pictures_of(x).flatten(1), (x[:, :NUM_PIXELS] + 1) / 2)
        assert module.captions_of(x).tolist() == [CAPTION] * 2

    def test_latents(self) -> None:
        module, x = model_of(LATENT, 3 * 64 + LENGTH, peft=LORA, num_inference_steps=2), inputs(2, 3 * 64)
        assert module.picture_shape == (3, 8, 8)
        assert module.sample(torch.tensor([CAPTION]), Rng(0)).shape == (1, 3, 8, 8)
        assert module.vae is not None
        with torch.no_grad():
            found = module.vae.encode(x[:, :192].reshape(2, 3, 8, 8)).latent_dist.mode()  # type: ignore[operator]
        torch.testing.assert_close(module._latents(x, is_random=False), found * 0.18215)
        assert all(name.startswith("net.") for name in module.state_dict())


class TestReading:
    def test_padding_is_that_of_each_encoder(self) -> None:
        module = model_of(TWO_ENCODERS)
        seen: list[Tensor] = []
        for encoder in module.reader.encoders:
            encoder.register_forward_pre_hook(lambda _, a, k: seen.append(k["input_ids"]), with_kwargs=True)
        condition = module.reader(torch.tensor([CAPTION]))
        assert [ids.tolist() for ids in seen] == [[[1, 2, 3, 0, 0]], [[1, 2, 3, 3, 3]]]
        assert condition.hidden.shape == (1, LENGTH, 32)
        assert condition.pooled is not None
        assert condition.pooled.shape == (1, 8)
        assert condition.arguments(4, 1)["added_cond_kwargs"]["time_ids"].tolist() == [[4, 4, 0, 0, 4, 4]]

    def test_an_empty_caption_is_what_the_tokenizer_writes(self) -> None:
        reader = model_of(TRANSFORMED).reader
        reader.empty_ids = (7, 8)
        empty, written = reader(torch.full((1, LENGTH), -1.0)), reader(torch.tensor([[7.0, 8.0, -1.0, -1.0, -1.0]]))
        torch.testing.assert_close(empty.hidden, written.hidden)
        assert empty.mask is not None
        assert empty.mask.tolist() == [[1, 1, 0, 0, 0]]
        reader.empty_ids = ()
        # Something must be attended to.
        assert reader(torch.full((1, LENGTH), -1.0)).mask.tolist() == [[1, 0, 0, 0, 0]]

    def test_an_empty_caption_is_zeros_where_the_pipeline_says_so(self, tmp_path: Path) -> None:
        folder = save_pipeline(model_of(TWO_ENCODERS).pipeline(), tmp_path / "base")
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps({**index, "force_zeros_for_empty_prompt": True}))
        pipeline = load_pipeline(pipeline_base(str(folder), {}, 0))
        condition = Reader(pipeline)(torch.tensor([[-1.0] * LENGTH, CAPTION]))
        assert condition.pooled is not None
        for part in (condition.hidden, condition.pooled):
            assert [bool(row.any()) for row in part] == [False, True]
        save_pipeline(pipeline, tmp_path / "again")
        assert "force_zeros_for_empty_prompt" in (tmp_path / "again" / "model_index.json").read_text()

    def test_tokens_beyond_the_vocabulary(self) -> None:
        with pytest.raises(DataError) as error:
            model_of().reader(torch.tensor([[1.0, 12.0]]))
        assert (error.value.what, error.value.where) == (
            "token 12 is beyond the model's vocabulary of 12",
            "data.tokenizer",
        )


class TestWhatIsTrained:
    def test_the_state_is_the_adapter(self) -> None:
        module = model_of(peft=LORA)
        state = module.state_dict()
        # 2 factors for to_q, to_k, to_v, to_out of 2 attentions of 3 blocks: one down, two up.
        assert len(state) == 2 * 4 * 2 * 3
        assert all(".lora_A." in name or ".lora_B." in name for name in state)
        assert len(lora_layout(pipeline_spec(peft=LORA)).modules) == 4 * 2 * 3

    @pytest.mark.parametrize(
        ("kind", "part"),
        [("full", "conv_in.weight"), ("bias", "conv_in.bias"), ("head", "conv_out.weight"), ("dora", "magnitude")],
    )
    def test_other_parts(self, kind: str, part: str) -> None:
        state = model_of(peft={"kind": kind, "rank": 2}).state_dict()
        assert any(part in name for name in state)
        assert not any(name.startswith("reader") for name in state)
        assert (len(state) == 2) == (kind == "head")

    def test_the_text_encoder_too(self) -> None:
        state = model_of(peft={"kind": "head"}, trains_text_encoder=True).state_dict()
        assert "reader.encoders.0.embeddings.token_embedding.weight" in state

    def test_the_base_is_shared_and_the_artifact_is_the_model(self) -> None:
        specification = pipeline_spec(peft=LORA, num_inference_steps=2)
        one, two = specification.build(), specification.build()
        frozen = "net.base_model.model.conv_in.weight"
        assert one.get_parameter(frozen).data_ptr() == two.get_parameter(frozen).data_ptr()
        with torch.no_grad():
            for parameter in one.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        again = Artifact.of(specification, detached_state(one)).module()
        x = inputs(2)
        assert torch.equal(again(x), one.eval()(x))
        assert not torch.equal(two(x), one(x))

    def test_tokenizers_stay_with_their_pipeline(self, tmp_path: Path) -> None:
        base = save_pipeline(model_of().pipeline(), tmp_path / "base")
        tokenizer = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unknown>", "pad_token": "cat"}
        (base / "tokenizer").mkdir()
        (base / "tokenizer" / "tokenizer.json").write_text(words_file(["a cat"]))
        (base / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        facts: dict[str, Any] = {"input_shape": (WIDTH,), "num_classes": 2, "seed": 0}
        module = spec("diffusers", {"path": str(base), "peft": LORA}, **facts).build()
        assert isinstance(module, TextToImage)
        assert (module.reader.pad_ids, module.reader.empty_ids) == ((2,), ())
        again = save_pipeline(module.pipeline(), tmp_path / "again")
        assert (again / "tokenizer" / "tokenizer.json").read_text() == words_file(["a cat"])
        assert load_pipeline(pipeline_base(str(again), {}, 0)).pad_ids == (2,)

    def test_a_pipeline_with_the_adapter_in_its_weights(self, tmp_path: Path) -> None:
        module = model_of(peft=LORA, num_inference_steps=2)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1)
        folder = save_pipeline(module.pipeline(), tmp_path / "whole")
        facts: dict[str, Any] = {"input_shape": (WIDTH,), "num_classes": 2, "seed": 0}
        whole = spec("diffusers", {"path": str(folder), "num_inference_steps": 2}, **facts).build()
        torch.testing.assert_close(whole(inputs(2)), module(inputs(2)), rtol=1e-4, atol=1e-5)
        import diffusers

        again: Any = diffusers.UNet2DConditionModel
        again = again.from_pretrained(folder / "unet")
        assert torch.equal(again.conv_in.weight, module.get_parameter("net.base_model.model.conv_in.weight"))


class TestWhatIsRefused:
    def test_folders(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError) as error:
            spec("diffusers", {"path": str(tmp_path / "gone")}, input_shape=(WIDTH,), num_classes=2, seed=0)
        assert error.value.what == "there is no such folder"
        folder = save_pipeline(model_of().pipeline(), tmp_path / "base")
        found = spec("diffusers", {"path": str(folder)}, input_shape=(WIDTH,), num_classes=2, seed=0)
        (folder / "unet").rename(tmp_path / "unet")
        with pytest.raises(ConfigError) as error:
            spec("diffusers", {"path": str(folder)}, input_shape=(WIDTH,), num_classes=2, seed=0)
        assert (error.value.what, error.value.fix) == (
            "the pipeline has neither a unet nor a transformer",
            "give it one of the two: what predicts the noise",
        )
        save_pipeline(model_of({**PIXELS, "unet": {**UNET, "block_out_channels": [4]}}).pipeline(), folder)
        _pristine.cache_clear()  # as in another process
        with pytest.raises(ModelError) as changed:
            found.build()
        assert changed.value.what == "the pipeline here has other weights than the one that was agreed on"
        (folder / "scheduler" / "scheduler_config.json").unlink()
        (folder / "scheduler").rmdir()
        with pytest.raises(ConfigError, match="the pipeline has no scheduler"):
            spec("diffusers", {"path": str(folder)}, input_shape=(WIDTH,), num_classes=2, seed=0)

    def test_a_name_that_the_hub_does_not_give(self, monkeypatch: pytest.MonkeyPatch) -> None:
        import diffusers

        asked = []

        def download(name: str, **settings: Any) -> str:
            asked.append((name, settings))
            raise OSError("no network\nand more")

        monkeypatch.setattr(diffusers.DiffusionPipeline, "download", download)
        with pytest.raises(ConfigError) as error:
            spec("diffusers", {"path": "nobody/nothing"}, input_shape=(WIDTH,), num_classes=2, seed=0)
        assert (error.value.what, error.value.where) == (
            "there is no such folder, and the hub did not give it: no network",
            "model.path: nobody/nothing",
        )
        # Weights in other formats than safetensors are not fetched.
        assert asked == [("nobody/nothing", {"use_safetensors": True})]

    def test_a_folder_may_lie_elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        save_pipeline(model_of().pipeline(), tmp_path / "bases" / "nothing")
        monkeypatch.setenv("FEDFUSE_BASE_MODELS", str(tmp_path / "bases"))
        found = spec("diffusers", {"path": "nobody/nothing"}, input_shape=(WIDTH,), num_classes=2, seed=0)
        assert found.recipe["base"]["path"] == "nobody/nothing"
        assert isinstance(found.build(), TextToImage)

    def test_parts_that_are_not_known(self, tmp_path: Path) -> None:
        folder = save_pipeline(model_of().pipeline(), tmp_path / "base")
        config = json.loads((folder / "unet" / "config.json").read_text())
        (folder / "unet" / "config.json").write_text(json.dumps({**config, "_class_name": "FluxTransformer2DModel"}))
        with pytest.raises(ConfigError) as error:
            spec("diffusers", {"path": str(folder)}, input_shape=(WIDTH,), num_classes=2, seed=0)
        assert (error.value.what, error.value.fix) == (
            "the unet is a FluxTransformer2DModel",
            "those that can be used: UNet2DConditionModel, PixArtTransformer2DModel",
        )

    @pytest.mark.parametrize(
        ("config", "what"),
        [
            ({"text_encoder": TEXT_ENCODER}, "the pipeline has neither a unet nor a transformer"),
            ({"unet": UNET}, "the pipeline has no text_encoder"),
            ({**PIXELS, "refiner": {}}, 'a pipeline has no part "refiner"'),
            ({**PIXELS, "unet": {**UNET, "depth": 3}}, 'a UNet2DConditionModel has no setting "depth"'),
            ({**PIXELS, "scheduler": {"prediction_type": "flow"}}, "the pipeline predicts flow"),
            (
                {**PIXELS, "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler"}},
                "the pipeline predicts a flow",
            ),
        ],
    )
    def test_configurations(self, config: Any, what: str) -> None:
        with pytest.raises(ConfigError) as error:
            pipeline_spec(config)
        assert error.value.what == what

    def test_inputs_that_do_not_fit(self) -> None:
        # 28 x 28 pixels for a pipeline of 4 x 4.
        with pytest.raises(ConfigError) as error:
            pipeline_spec(width=28 * 28 + LENGTH)
        assert (error.value.what, error.value.fix) == (
            "inputs of 789 numbers are no pictures of 1 x 4 x 4 with captions of 1 to 6 tokens",
            "set data.size to 4, channels to 1 and max_length to 6 or less",
        )
        with pytest.raises(ConfigError, match="are no pictures with captions"):
            spec("diffusers", {"config": PIXELS}, input_shape=(1, 4, 4), num_classes=2, seed=0)
        with pytest.raises(ConfigError, match="pictures of 9 pixels cannot be shrunk 2 times"):
            pipeline_spec(LATENT, image_size_px=9)

    @pytest.mark.parametrize(
        ("settings", "what"),
        [
            ({"caption_dropout": 1.0}, "caption_dropout is 1"),
            ({"num_inference_steps": 0}, "num_inference_steps is 0"),
            ({"peft": {"kind": "prompt"}}, "a text-to-image model has no place for virtual tokens"),
            ({"peft": {"kind": "lora", "rank": 8}}, None),
            ({"path": "somewhere"}, "there are both a path and a config"),
        ],
    )
    def test_settings(self, settings: Any, what: str | None) -> None:
        with pytest.raises(ConfigError) as error:
            pipeline_spec(**settings)
        if what is not None:
            assert error.value.what == what
        else:
            assert error.value.what.startswith("the rank 8 is not low for")
