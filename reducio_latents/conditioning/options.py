"""Which models condition, and what they are given. Plain Python."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from reducio_latents.core.choices import (
    DtypeOrAuto,
    TextCleaning,
    TextLayer,
    TextPreset,
    TextValues,
)
from reducio_latents.core.config import check_choices
from reducio_latents.errors import ConfigError

POOLED_SUFFIX = "_pooled"
"""What columns of one vector a caption, or an image, are called after their tokens' name."""
_TEXT_COLUMN = re.compile(
    rf"(?!.*_mask$)text(?::(?P<name>[A-Za-z0-9][A-Za-z0-9_-]{{0,59}}?))?(?:{POOLED_SUFFIX})?"
)


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


def is_text_column(column: str) -> bool:
    """Whether a column is of text: `text`, or `text:NAME`; of pooled vectors with `_pooled`."""
    return _TEXT_COLUMN.fullmatch(column) is not None


def text_name(column: str) -> str:
    """Return NAME of a column `text:NAME` or `text:NAME_pooled`, empty for `text`."""
    found = _TEXT_COLUMN.fullmatch(column)
    return (found["name"] or "") if found else ""


@dataclass(frozen=True, kw_only=True)
class TextOptions:
    """Which text encoder, and what it is given."""

    model: str | tuple[str, ...] | None = None
    """Folder or Hub name of a text encoder of transformers with its tokenizer, or of a pipeline.

    NAME=MODEL is for the columns text:NAME alone. Without: the preset's own, DeepFloyd/t5-v1_1-xxl
    if there is no preset."""
    preset: TextPreset | None = None
    """Make text as this diffusion model is given it; what is set beside it goes before.

    It decides template, layer, lengths, padding and cleaning."""
    template: str | None = None
    """Text around each caption, with {} for it; the tokens before that are left out."""
    layer: TextLayer | None = None
    """Which hidden states: an index from 0, the embeddings, or back from -1; or all of them."""
    cleaning: TextCleaning | None = None
    """`whitespace`: characters mended, single spaces. `pixart`: as Reducio-DiT expects; of T5 the
    default. `none`: as it is."""
    max_tokens: int | None = None
    """Longer captions are cut. Without: the preset's number, or 120."""
    dtype: DtypeOrAuto = "auto"
    """`auto`: bfloat16 if it was measured to be good enough."""
    values: TextValues | None = None
    """How vectors are stored; `int8` takes half the bytes and has a measured error.

    Without: float16, or bfloat16 where the model gives numbers too large for it."""

    def __post_init__(self) -> None:
        check_choices(self, "text ")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError(f"text max_tokens must be >= 1, got {self.max_tokens}.")
        if self.template is not None and self.template.count("{}") != 1:
            raise ConfigError("text template must have {} once, where the caption belongs.")
        if self.layer not in (None, "all") and type(self.layer) is not int:
            raise ConfigError(f"text layer is a whole number or all, got {self.layer!r}.")

    @property
    def models(self) -> list[tuple[str, str]]:
        """Each model with the name of its columns, which is empty for any column."""
        given = (self.model,) if isinstance(self.model, str) else self.model or ()
        found = []
        for text in given:
            name, equals, model = text.partition("=")
            named = equals and re.fullmatch(r"[\w-]+", name, re.ASCII)
            found.append((name, model) if named else ("", text))
        return found

    def model_of(self, column: str) -> str | None:
        """Return the model of a column, None if none is said; raise ConfigError for several."""
        name = text_name(column)
        mine = [model for key, model in self.models if key and key == name]
        mine = mine or [model for key, model in self.models if not key]
        if len(mine) > 1:
            raise ConfigError(
                f"text model names {' and '.join(mine[:2])} for column {column}. Name one, or "
                "write NAME=MODEL for the columns text:NAME."
            )
        return mine[0] if mine else None
