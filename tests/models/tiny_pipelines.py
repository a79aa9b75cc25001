"""Configurations of text-to-image pipelines that are built in milliseconds."""

from __future__ import annotations

from typing import Any

TEXT_ENCODER: dict[str, Any] = {
    "vocab_size": 12,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "max_position_embeddings": 6,
}
UNET: dict[str, Any] = {
    "sample_size": 4,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [8],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D"],
    "mid_block_type": None,
    "up_block_types": ["CrossAttnUpBlock2D"],
    "cross_attention_dim": 16,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
TRANSFORMER: dict[str, Any] = {
    "sample_size": 4,
    "in_channels": 1,
    "out_channels": 2,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "cross_attention_dim": 16,
    "caption_channels": 16,
    "patch_size": 2,
}
VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [4, 4],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 2,
    "latent_channels": 2,
}
SCHEDULER: dict[str, Any] = {"num_train_timesteps": 10, "beta_start": 0.1, "beta_end": 0.1, "clip_sample": False}
PIXELS: dict[str, Any] = {"unet": UNET, "text_encoder": TEXT_ENCODER, "scheduler": SCHEDULER}
TRANSFORMED: dict[str, Any] = {"transformer": TRANSFORMER, "text_encoder": TEXT_ENCODER, "scheduler": SCHEDULER}
LATENT: dict[str, Any] = {
    **PIXELS,
    "unet": {**UNET, "in_channels": 2, "out_channels": 2},
    "vae": VAE,
}
# As SDXL: two encoders whose states are joined, the second's pooled caption, and the size of the picture.
TWO_ENCODERS: dict[str, Any] = {
    **PIXELS,
    "unet": {
        **UNET,
        "cross_attention_dim": 32,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 4,
        "projection_class_embeddings_input_dim": 24 + 8,
    },
    "text_encoder": {**TEXT_ENCODER, "num_hidden_layers": 2},
    "text_encoder_2": {
        **TEXT_ENCODER,
        "_class_name": "CLIPTextModelWithProjection",
        "num_hidden_layers": 2,
        "projection_dim": 8,
        "pad_token_id": 3,
    },
}
NUM_PIXELS, LENGTH = 16, 5
WIDTH = NUM_PIXELS + LENGTH
