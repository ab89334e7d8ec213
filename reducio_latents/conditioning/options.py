"""Which models condition, and what they are given. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from reducio_latents.core.choices import DtypeOrAuto, TextValues
from reducio_latents.core.config import check_choices
from reducio_latents.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ContentLatentOptions:
    """Which image autoencoder."""

    model: str = "stabilityai/sd-vae-ft-ema"
    """Folder, Hub name, or a weights file with its config.json beside it; AutoencoderKL."""
    dtype: DtypeOrAuto = "auto"
    """`auto`: bfloat16, unless the model's config asks for float32 (SDXL's does) or bfloat16 was
    measured to be too coarse for it."""

    def __post_init__(self) -> None:
        check_choices(self, "content_latent ")


@dataclass(frozen=True, kw_only=True)
class ContentClipOptions:
    """Which image encoder, and what it is given."""

    model: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Folder or Hub name of a CLIP, SigLIP or DINOv2 model, or OpenCLIP's own checkpoint."""
    resize: Literal["published", "antialias"] = "published"
    """To the encoder's square. `published`: Gaussian blur, then bicubic with corners aligned.
    `antialias`: antialiased bicubic, as Pillow and torchvision resize."""
    dtype: DtypeOrAuto = "auto"
    """`auto`: bfloat16 if it was measured to be good enough."""
    quantization: Literal["none", "int8"] = "none"
    """`int8` halves the bytes of tokens; its error is measured and written into the store."""

    def __post_init__(self) -> None:
        check_choices(self, "content_clip ")


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which text encoder, and what it is given."""

    model: str = "DeepFloyd/t5-v1_1-xxl"
    """Folder or Hub name of a text encoder of transformers with its tokenizer, or of a pipeline."""
    cleaning: Literal["none", "pixart"] = "pixart"
    """`pixart`: as PixArt-style models expect, Reducio-DiT among them. `none`: as it is."""
    max_tokens: int = 120
    """Longer captions are cut."""
    dtype: DtypeOrAuto = "auto"
    """`auto`: bfloat16 if it was measured to be good enough."""
    values: TextValues = "float16"
    """How vectors are stored; `int8` takes half the bytes and has a measured error."""

    def __post_init__(self) -> None:
        check_choices(self, "text ")
        if self.max_tokens < 1:
            raise ConfigError(f"text max_tokens must be >= 1, got {self.max_tokens}.")
