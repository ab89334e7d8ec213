"""Options that say which models condition; shared by `encode-corpus` and `add-column`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Decorated = Callable[..., Any]

DTYPES = ["auto", "float32", "bfloat16", "float16"]
PREFIXES = ("content_latent", "content_clip", "text")
"""Each option's name begins with the column that it belongs to."""


def _dtype(column: str) -> Callable[[Decorated], Decorated]:
    return click.option(
        f"--{column}-dtype",
        type=click.Choice(DTYPES),
        default="auto",
        show_default=True,
        help="auto: bfloat16 where its error was measured to be small.",
    )


OPTIONS: list[Callable[[Decorated], Decorated]] = [
    click.option(
        "--content-latent-model",
        default="stabilityai/sd-vae-ft-ema",
        show_default=True,
        metavar="DIR|FILE|NAME",
        help="AutoencoderKL of diffusers, for content_latent.",
    ),
    _dtype("content-latent"),
    click.option(
        "--content-clip-model",
        default="laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        show_default=True,
        metavar="DIR|FILE|NAME",
        help="CLIP, SigLIP or DINOv2, for content_clip and content_clip_pooled.",
    ),
    _dtype("content-clip"),
    click.option(
        "--content-clip-resize",
        type=click.Choice(["published", "antialias"]),
        default="published",
        show_default=True,
        help="published: blur and bicubic, as Reducio's extraction; antialias: as Pillow.",
    ),
    click.option(
        "--content-clip-quantization",
        type=click.Choice(["none", "int8"]),
        default="none",
        show_default=True,
        help="int8: half the bytes; the error is measured and stored.",
    ),
    click.option(
        "--text-model",
        default="DeepFloyd/t5-v1_1-xxl",
        show_default=True,
        metavar="DIR|NAME",
        help="Text encoder with its tokenizer.",
    ),
    _dtype("text"),
    click.option(
        "--text-cleaning",
        type=click.Choice(["pixart", "none"]),
        default="pixart",
        show_default=True,
        help="pixart: captions cleaned as PixArt-style models expect.",
    ),
    click.option("--text-max-tokens", type=int, default=120, show_default=True),
    click.option(
        "--text-values",
        type=click.Choice(["float16", "bfloat16", "int8"]),
        default="float16",
        show_default=True,
        help="How vectors are stored.",
    ),
    click.option(
        "--zstd",
        default="",
        metavar="A,B,...",
        help="Columns to compress; pays for raw images and 8-bit codes.",
    ),
]


def column_options(function: Decorated) -> Decorated:
    """Add the options to a command."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function


def take_column_options(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with each column's own options gathered under its name."""
    from reducio_latents.conditioning.options import (
        ContentClipOptions,
        ContentLatentOptions,
        TextOptions,
    )

    classes = (ContentLatentOptions, ContentClipOptions, TextOptions)
    kinds: dict[str, Callable[..., Any]] = dict(zip(PREFIXES, classes, strict=True))
    rest = {key: value for key, value in settings.items() if not _column_of(key)}
    for column, kind in kinds.items():
        own = {
            key.removeprefix(f"{column}_"): value
            for key, value in settings.items()
            if _column_of(key) == column
        }
        rest[column] = kind(**own)
    return {**rest, "zstd": split_names(settings["zstd"])}


def _column_of(key: str) -> str | None:
    return next((prefix for prefix in PREFIXES if key.startswith(f"{prefix}_")), None)


def split_names(text: str) -> tuple[str, ...]:
    """Read `a,b,c`."""
    return tuple(name.strip() for name in text.split(",") if name.strip())
