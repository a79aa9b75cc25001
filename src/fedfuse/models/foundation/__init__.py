"""Large pre-trained models of transformers and diffusers, of which a part is trained."""

from fedfuse.models.foundation import diffusion as diffusion
from fedfuse.models.foundation import transformers as transformers
from fedfuse.models.foundation.foundation import Foundation as Foundation
from fedfuse.models.foundation.foundation import is_foundation as is_foundation
from fedfuse.models.foundation.lora import LoraLayout as LoraLayout
from fedfuse.models.foundation.lora import lora_layout as lora_layout
from fedfuse.models.foundation.lora import with_rank as with_rank
