"""Column encoders by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property, partial
from typing import TYPE_CHECKING

from reducio_latents.core.geometry import Bucket
from reducio_latents.encode.columns import (
    CONTENT,
    FRAMES,
    CaptionColumn,
    ColumnEncoder,
    ContentImageColumn,
    FrameTimesColumn,
    MotionColumn,
)
from reducio_latents.encode.options import BUCKET_MULTIPLE, EncodeOptions
from reducio_latents.errors import ConfigError
from reducio_latents.store.meta import ColumnMeta

if TYPE_CHECKING:
    from reducio_latents.encode.conditioning_columns import SharedImageEncoder


@dataclass(frozen=True)
class Build:
    """What the columns of one run are built from; models that two of them use are loaded once."""

    options: EncodeOptions

    @cached_property
    def image_encoder(self) -> SharedImageEncoder:
        from reducio_latents.conditioning.clip import ImageEncoder
        from reducio_latents.encode.conditioning_columns import SharedImageEncoder

        options = self.options
        return SharedImageEncoder(ImageEncoder(options.content_clip, options.torch_device))


def _motion(build: Build) -> ColumnEncoder:
    import torch

    from reducio_latents.autoencoders import load_autoencoder
    from reducio_latents.encode.gpu import raise_compile_limit

    options = build.options
    load = partial(
        load_autoencoder,
        options.model,
        options.weights,
        device=options.torch_device,
        tiling="auto" if options.tiling == "auto" else None,
    )
    on_gpu = options.torch_device.startswith("cuda")
    autoencoder = load(
        dtype=getattr(torch, options.dtype),
        parts="all" if options.check_every else "encoder",
        compile=options.compile,
        memory_format=torch.channels_last_3d if on_gpu else torch.contiguous_format,
    )
    if options.compile != "none":
        raise_compile_limit(autoencoder, options.bucket_list(BUCKET_MULTIPLE))
    decodes = bool(options.check_every)
    return MotionColumn(
        autoencoder,
        options.resize,
        pad_to=options.clips_per_batch if options.compile != "none" else None,
        load_exact=partial(load, parts="all" if decodes else "encoder"),
        decodes_to_measure=decodes,
    )


def _content_image(build: Build) -> ColumnEncoder:
    return ContentImageColumn(build.options.image_codec, build.options.resize)


def _content_latent(build: Build) -> ColumnEncoder:
    from reducio_latents.conditioning.content_latent import ImageAutoencoder
    from reducio_latents.encode.conditioning_columns import ContentLatentColumn

    options = build.options
    encoder = ImageAutoencoder(options.content_latent, options.torch_device)
    return ContentLatentColumn(encoder, options.resize)


def _content_clip(build: Build) -> ColumnEncoder:
    from reducio_latents.encode.conditioning_columns import ContentClipColumn

    return ContentClipColumn(build.image_encoder, build.options.resize)


def _content_clip_pooled(build: Build) -> ColumnEncoder:
    from reducio_latents.encode.conditioning_columns import ContentClipPooledColumn

    return ContentClipPooledColumn(build.image_encoder, build.options.resize)


def _text(build: Build) -> ColumnEncoder:
    from reducio_latents.conditioning.text import TextEncoder
    from reducio_latents.encode.conditioning_columns import TextColumn

    return TextColumn(TextEncoder(build.options.text, build.options.torch_device))


def _caption(build: Build) -> ColumnEncoder:
    return CaptionColumn()


def _scores(build: Build) -> ColumnEncoder:
    from reducio_latents.encode.scores import Scorer, ScoresColumn

    own = build.options.scorer
    return ScoresColumn(build.options.resize, None if own is None else Scorer.load(own))


def _frame_times(build: Build) -> ColumnEncoder:
    return FrameTimesColumn(build.options.video_backend)


COLUMN_BUILDERS: dict[str, Callable[[Build], ColumnEncoder]] = {
    "motion": _motion,
    "content_image": _content_image,
    "content_latent": _content_latent,
    "content_clip": _content_clip,
    "content_clip_pooled": _content_clip_pooled,
    "text": _text,
    "caption": _caption,
    "frame_times": _frame_times,
    "scores": _scores,
}


def build_columns(options: EncodeOptions) -> Sequence[ColumnEncoder]:
    """Load the encoders of `options.columns`, in that order.

    Raise ConfigError for an unknown name, or one that is given twice.
    """
    for name in options.columns:
        check_column_name(name)
        if options.columns.count(name) > 1:
            raise ConfigError(f"column {name!r} is given twice.")
    if options.zstd and options.container != "zarr":
        raise ConfigError("zstd compresses rows of the zarr container only; leave it out.")
    for name in options.zstd:
        check_column_name(name)
    build = Build(options)
    return [COLUMN_BUILDERS[name](build) for name in options.columns]


def describe_column(
    encoder: ColumnEncoder, options: EncodeOptions, buckets: Sequence[Bucket], *, measure: bool
) -> ColumnMeta:
    """Return a column's description; with `measure`, also what its fast way to encode costs."""
    meta = encoder.describe(buckets)
    if options.deinterlaces and encoder.needs & {FRAMES, CONTENT}:
        meta = replace(meta, config={**meta.config, "deinterlace": "bwdif"})
    if encoder.name in options.zstd:
        meta = replace(meta, compression="zstd")
    if measure:
        meta = replace(meta, measured={**meta.measured, **encoder.measure(buckets[0])})
    return meta


def check_column_name(name: str) -> None:
    """Raise ConfigError, naming what was meant, unless there is such a column."""
    if name not in COLUMN_BUILDERS:
        close = get_close_matches(name, COLUMN_BUILDERS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(COLUMN_BUILDERS)}."
        raise ConfigError(f"there is no column {name!r}; {hint}")
