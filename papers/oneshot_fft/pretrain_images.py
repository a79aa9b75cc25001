"""A small text-to-image pipeline to start from: half of the classes, with captions, in small pictures.

Everything is trained, the text encoder too; fine-tuning then meets the other classes, of whose names the encoder has
seen nothing. What is written is a folder as diffusers has it, with the tokenizer of the captions.

    python papers/oneshot_fft/pretrain_images.py mnist [--data ../shared/data] [--epochs 6] [--out runs/oneshot_fft]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from fedfuse.core.seeding import Rng
from fedfuse.data.captions import PLACE, caption_tokens, words_file
from fedfuse.data.sources.captioned import Captioned
from fedfuse.models import spec
from fedfuse.models.foundation.pipeline import save_pipeline
from fedfuse.models.foundation.text_to_image import TextToImage
from fedfuse.training import LocalSGD, evaluate, train

SIDE_PX, MAX_LENGTH = 16, 6
PICTURES: dict[str, dict[str, Any]] = {
    "mnist": {
        "channels": 1,
        "templates": ("the digit {class}", "a handwritten {class}"),
        "classes": ("0", "1", "2", "3", "4"),
        "names": tuple("0123456789"),
    },
    "cifar10": {
        "channels": 3,
        "templates": ("a photo of a {class}", "a small {class}"),
        "classes": ("airplane", "bird", "deer", "frog", "ship"),
        "names": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
    },
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", choices=sorted(PICTURES))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/oneshot_fft"))
    parser.add_argument("--denoiser", choices=("unet", "transformer"), default="unet")
    parser.add_argument("--limit", type=int, default=16000, help="pictures to train on, of all classes")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    settings = PICTURES[arguments.pictures]
    folder = arguments.out / f"{arguments.pictures}_{arguments.denoiser}"
    if (folder / "model_index.json").exists():
        print(f"{folder} is there already")
        return
    words = [template.replace(PLACE, name) for template in settings["templates"] for name in settings["names"]]
    write_tokenizer(folder / "tokenizer", words)
    data = Captioned(
        path=str(arguments.data / arguments.pictures),
        size=SIDE_PX,
        channels=settings["channels"],
        templates=settings["templates"],
        classes=settings["classes"],
        tokenizer=str(folder / "tokenizer"),
        max_length=MAX_LENGTH,
    ).load(limit=arguments.limit, test_limit=500)
    config = architecture(settings["channels"], arguments.denoiser, caption_tokens("words", words).vocab_size)
    common: dict[str, Any] = {"input_shape": data.input_shape, "num_classes": data.num_classes, "seed": 0}
    model = spec("diffusers", {"config": config, "trains_text_encoder": True}, **common).build()
    assert isinstance(model, TextToImage)
    # One pass at a time, so that the loss can be watched; the rate falls to nothing over all of them.
    start = time.perf_counter()
    local = LocalSGD(
        num_epochs=arguments.epochs,
        batch_size=64,
        optimizer="adamw",
        learning_rate=arguments.learning_rate,
        schedule="cosine",
        grad_clip_norm=1.0,
    )
    with Rng(0).ambient("pre-training"):
        train(
            model,
            data.train,
            local,
            rng=Rng(0).child("pre-training"),
            device=torch.device(arguments.device),
            progress=lambda done, total: print(
                f"epoch {done} of {total}, {time.perf_counter() - start:.0f} s", flush=True
            ),
        )
    assert data.test is not None
    print(f"{len(data.train)} pictures, test loss {evaluate(model, data.test).loss:.4f}")
    save_pipeline(model.pipeline(), folder)
    print(f"written to {folder}")


def write_tokenizer(folder: Path, words: list[str]) -> None:
    """The words of all captions, also of the classes that are not trained on."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(words_file(words), encoding="utf-8")
    facts = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "<unknown>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(facts), encoding="utf-8")


def architecture(channels: int, denoiser: str, vocabulary: int) -> dict[str, Any]:
    """Configurations of the parts."""
    shape = {"sample_size": SIDE_PX, "in_channels": channels, "out_channels": channels, "cross_attention_dim": 64}
    unet = {
        **shape,
        "block_out_channels": [16, 32],
        "layers_per_block": 1,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": 4,
        "norm_num_groups": 8,
    }
    transformer = {
        **shape,
        "num_attention_heads": 4,
        "attention_head_dim": 16,
        "num_layers": 4,
        "caption_channels": 64,
        "patch_size": 2,
    }
    text_encoder = {
        "vocab_size": vocabulary,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": MAX_LENGTH,
    }
    scheduler = {"num_train_timesteps": 1000, "beta_schedule": "squaredcos_cap_v2", "prediction_type": "epsilon"}
    chosen = {"unet": unet} if denoiser == "unet" else {"transformer": transformer}
    return {**chosen, "text_encoder": text_encoder, "scheduler": scheduler}


if __name__ == "__main__":
    main()
