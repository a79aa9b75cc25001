"""What the captions of a batch are for the network that predicts noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedfuse.core.errors import DataError
from fedfuse.models.foundation.pipeline import Pipeline

_NO_LIMIT = 512


@dataclass(frozen=True)
class Condition:
    """Captions as a denoiser takes them.

    Args:
        hidden: states of the tokens, shape ``(n, length, width)``.
        mask: 1 where there is a token, shape ``(n, length)``; ``None`` attends to all.
        pooled: one vector per caption, where the denoiser takes one, shape ``(n, pooled width)``.
        is_transformer: whether the denoiser is a transformer.
        takes_size: whether it is told the size of the picture.
    """

    hidden: Tensor
    mask: Tensor | None
    pooled: Tensor | None
    is_transformer: bool
    takes_size: bool

    def arguments(self, side_px: int, num_pictures: int) -> dict[str, Any]:
        """Keyword arguments of the denoiser.

        Args:
            side_px: height and width of the pictures.
            num_pictures: of the batch.
        """
        found: dict[str, Any] = {"encoder_hidden_states": self.hidden}
        sizes = self.hidden.new_full((num_pictures, 2), float(side_px))
        if self.is_transformer:
            found["encoder_attention_mask"] = self.mask
            ratio = sizes[:, :1] / sizes[:, 1:]
            found["added_cond_kwargs"] = {
                "resolution": sizes if self.takes_size else None,
                "aspect_ratio": ratio if self.takes_size else None,
            }
        elif self.pooled is not None:
            # Size of the picture, where it was cut out, and size that is wanted.
            ids = torch.cat([sizes, torch.zeros_like(sizes), sizes], 1)
            found["added_cond_kwargs"] = {"text_embeds": self.pooled, "time_ids": ids}
        return found


class Reader(nn.Module):
    """The encoders of a pipeline: token ids to what the denoiser takes.

    Captions are padded and masked as diffusers does for each kind: a UNet attends to all places, a transformer to the
    tokens that are there.

    Args:
        pipeline: its parts.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.encoders = pipeline.encoders
        self.pad_ids, self.empty_ids = pipeline.pad_ids, pipeline.empty_ids
        self.zeroes_empty = pipeline.zeroes_empty
        self.is_transformer = pipeline.kind == "transformer"
        self.takes_size = bool(getattr(pipeline.denoiser, "use_additional_conditions", False))
        config: Any = pipeline.denoiser.config
        own: list[Any] = [encoder.config for encoder in pipeline.encoders]
        self.vocabularies = [int(one.vocab_size) for one in own]
        self.longest = min(int(getattr(one, "max_position_embeddings", _NO_LIMIT)) for one in own)
        self.takes_pooled = config.get("addition_embed_type") == "text_time"

    def forward(self, captions: Tensor) -> Condition:
        """Read captions.

        Args:
            captions: tokens as floats, shape ``(n, length)``; below 0 is padding, and a caption of padding alone is
                empty.

        Returns:
            What the denoiser takes.

        Raises:
            DataError: a token is not in the vocabulary.
        """
        ids = captions.round().long()
        vocabulary = min(self.vocabularies)
        if int(ids.max()) >= vocabulary:
            raise DataError(
                f"token {int(ids.max())} is beyond the model's vocabulary of {vocabulary}",
                where="data.tokenizer",
                fix="use the tokenizer that belongs to the model",
            )
        is_empty = (ids < 0).all(1)
        ids = self._with_empty_ones(ids)
        mask = ids >= 0
        # A caption without tokens would leave nothing to attend to.
        mask[:, 0] |= ~mask.any(1)
        states, pooled = [], None
        for encoder, pad in zip(self.encoders, self.pad_ids, strict=True):
            filled = ids.masked_fill(ids < 0, pad)
            seen = encoder(
                input_ids=filled,
                attention_mask=mask.long() if self.is_transformer else None,
                output_hidden_states=self.takes_pooled,
            )
            # SDXL takes the last state but one, and the pooled caption of its second encoder.
            states.append(seen.hidden_states[-2] if self.takes_pooled else seen.last_hidden_state)
            pooled = seen.text_embeds if self.takes_pooled and hasattr(seen, "text_embeds") else pooled
        hidden = torch.cat(states, -1)
        if self.zeroes_empty:
            hidden = hidden.masked_fill(is_empty[:, None, None], 0)
            pooled = None if pooled is None else pooled.masked_fill(is_empty[:, None], 0)
        attended = mask.long() if self.is_transformer else None
        return Condition(hidden, attended, pooled, self.is_transformer, self.takes_size)

    def _with_empty_ones(self, ids: Tensor) -> Tensor:
        """Captions of padding alone as the tokenizer writes a text without words."""
        empty = torch.full_like(ids[:1], -1)
        first = ids.new_tensor(self.empty_ids[: ids.shape[1]])
        empty[0, : len(first)] = first
        return torch.where((ids < 0).all(1, keepdim=True), empty, ids)
