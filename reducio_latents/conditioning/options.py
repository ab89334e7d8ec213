"""Which models condition, and what they are given. Plain Python."""

from __future__ import annotations

from dataclasses import dataclass

from reducio_latents.conditioning.cleaning import get_cleaning
from reducio_latents.errors import ConfigError
from reducio_latents.store.text_rows import VALUES

CLIP_RESIZES = ("published", "antialias")
QUANTIZATIONS = ("none", "int8")
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class ContentLatentOptions:
    """Which image autoencoder."""

    model: str = "stabilityai/sd-vae-ft-ema"
    """Folder, Hub name, or a weights file with its config.json beside it; AutoencoderKL."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or `auto`: bfloat16, unless the model's config asks for float32
    (SDXL's does) or bfloat16 was measured to be too coarse for it."""

    def __post_init__(self) -> None:
        _check_dtype("content_latent", self.dtype)


@dataclass(frozen=True, kw_only=True)
class ContentClipOptions:
    """Which image encoder, and what it is given."""

    model: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
    """Folder or Hub name of a CLIP, SigLIP or DINOv2 model, or OpenCLIP's own checkpoint."""
    resize: str = "published"
    """To the encoder's square. `published`: Gaussian blur, then bicubic with corners aligned.
    `antialias`: antialiased bicubic, as Pillow and torchvision resize."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or `auto`: bfloat16 where it was measured to be good enough."""
    quantization: str = "none"
    """`int8` halves the bytes of tokens; its error is measured and written into the store."""

    def __post_init__(self) -> None:
        _check_dtype("content_clip", self.dtype)
        for name, choices in (("resize", CLIP_RESIZES), ("quantization", QUANTIZATIONS)):
            if getattr(self, name) not in choices:
                raise ConfigError(
                    f"content_clip {name} is {getattr(self, name)!r}; choose one of "
                    f"{', '.join(choices)}."
                )


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which text encoder, and what it is given."""

    model: str = "DeepFloyd/t5-v1_1-xxl"
    """Folder or Hub name of a text encoder of transformers with its tokenizer, or of a pipeline."""
    cleaning: str = "pixart"
    """`pixart`: as PixArt-style models expect, Reducio-DiT among them. `none`: as it is."""
    max_tokens: int = 120
    """Longer captions are cut."""
    dtype: str = "auto"
    """float32, bfloat16, float16, or `auto`: bfloat16 where it was measured to be good enough."""
    values: str = "float16"
    """How vectors are stored: float16, bfloat16, or int8, half the bytes and a measured error."""

    def __post_init__(self) -> None:
        get_cleaning(self.cleaning)
        _check_dtype("text", self.dtype)
        if self.values not in VALUES:
            raise ConfigError(f"text values is {self.values!r}; choose one of {', '.join(VALUES)}.")
        if self.max_tokens < 1:
            raise ConfigError(f"text max_tokens must be >= 1, got {self.max_tokens}.")


def _check_dtype(column: str, dtype: str) -> None:
    if dtype not in DTYPES:
        raise ConfigError(f"{column} dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")
