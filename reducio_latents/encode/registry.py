"""Column encoders by name."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, get_args

from reducio_latents.autoencoders import weights_place
from reducio_latents.conditioning.options import is_text_column, text_name
from reducio_latents.core.choices import Dtype
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
from reducio_latents.encode.fast_path import BATCH_SIZE, DEFAULT_BATCH, FLOAT32_ERROR, MOST_ERROR
from reducio_latents.encode.options import BUCKET_MULTIPLE, EncodeOptions
from reducio_latents.errors import ConfigError
from reducio_latents.store.meta import ColumnMeta
from reducio_latents.video import decodes_on_gpu

if TYPE_CHECKING:
    from reducio_latents.encode.conditioning_columns import SharedImageEncoder
    from reducio_latents.vae.model import Parts

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Build:
    """What the columns of one run are built from; models that two of them use are loaded once."""

    options: EncodeOptions
    stored: Mapping[str, ColumnMeta]
    """The columns that the store has, which decide what the options leave open."""

    @cached_property
    def image_encoder(self) -> SharedImageEncoder:
        from reducio_latents.encode.conditioning_columns import SharedImageEncoder

        return SharedImageEncoder(self.options.content_clip, self.options.torch_device)


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
        trust_config=options.trust_config,
    )
    on_gpu = options.torch_device.startswith("cuda")
    parts: Parts = "all" if options.check_every else "encoder"
    buckets = options.bucket_list(BUCKET_MULTIPLE)

    def column(dtype: str) -> MotionColumn:
        autoencoder = load(
            dtype=getattr(torch, dtype),
            parts=parts,
            compile=options.compile,
            memory_format=torch.channels_last_3d if on_gpu else torch.contiguous_format,
        )
        compiled = options.compile != "none"
        if compiled:
            raise_compile_limit(autoencoder, buckets)
        return MotionColumn(
            autoencoder,
            options.resize,
            pad_to=batch_size_of(options, build.stored) if compiled else None,
            load_exact=partial(load, parts=parts),
            decodes_to_measure=bool(options.check_every),
            finds_batch_size=on_gpu and not compiled and options.batch_size == "auto",
        )

    if options.dtype != "auto":
        return column(options.dtype)
    if "motion" in build.stored:
        precision = build.stored["motion"].config.get("precision")
        stored = str(precision.get("dtype")) if isinstance(precision, dict) else ""
        return column(stored if stored in get_args(Dtype) else "float32")
    if not (on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)):
        return column("float32")
    fast = column("bfloat16")
    error = fast.measure(buckets[0]).get(FLOAT32_ERROR, 0.0)
    if error <= MOST_ERROR:
        return fast
    log.warning(
        "moments made in bfloat16 are %.1f%% from those of float32 here, more than %.0f%%: "
        "going on in float32. To have bfloat16 all the same: --dtype bfloat16.",
        100 * error,
        100 * MOST_ERROR,
    )
    return column("float32")


def _content_latent(build: Build) -> ColumnEncoder:
    from reducio_latents.conditioning.images import ImageAutoencoder
    from reducio_latents.encode.conditioning_columns import ContentLatentColumn

    options = build.options
    encoder = ImageAutoencoder(
        options.content_latent, options.torch_device, trust_config=options.trust_config
    )
    return ContentLatentColumn(encoder, options.resize)


def _content_clip(build: Build) -> ColumnEncoder:
    from reducio_latents.encode.conditioning_columns import ContentClipColumn

    return ContentClipColumn(build.image_encoder, build.options.resize)


def _content_clip_pooled(build: Build) -> ColumnEncoder:
    from reducio_latents.encode.conditioning_columns import ContentClipPooledColumn

    return ContentClipPooledColumn(build.image_encoder, build.options.resize)


def _text(build: Build, name: str = "text") -> ColumnEncoder:
    from reducio_latents.conditioning.text import TextEncoder
    from reducio_latents.encode.conditioning_columns import TextColumn

    options, stored = build.options.text, build.stored.get(name)
    if stored is not None:  # what is left open stays as it was
        was: dict[str, Any] = {}
        if not (options.cleaning or options.preset) and stored.config.get("cleaning"):
            was["cleaning"] = str(stored.config["cleaning"]).partition(",")[0]
        if not options.values and stored.config.get("values"):
            was["values"] = stored.config["values"]
        options = replace(options, **was)
    return TextColumn(TextEncoder(options, build.options.torch_device, name), name)


def _scores(build: Build) -> ColumnEncoder:
    from reducio_latents.encode.scores import Scorer, ScoresColumn

    own = build.options.scorer
    return ScoresColumn(build.options.resize, None if own is None else Scorer.load(own))


COLUMN_BUILDERS: dict[str, Callable[[Build], ColumnEncoder]] = {
    "motion": _motion,
    "content_image": lambda build: ContentImageColumn(
        build.options.image_codec, build.options.resize
    ),
    "content_latent": _content_latent,
    "content_clip": _content_clip,
    "content_clip_pooled": _content_clip_pooled,
    "text": _text,
    "caption": lambda _: CaptionColumn(),
    "frame_times": lambda build: FrameTimesColumn(build.options.video_backend),
    "scores": _scores,
}


def batch_size_of(options: EncodeOptions, stored: Mapping[str, ColumnMeta]) -> int:
    """Return how many rows of a shard are handed to the encoders at once.

    `stored` are the store's columns, of which motion says what `auto` has been found to be.
    """
    if options.batch_size != "auto":
        return options.batch_size
    found = stored["motion"].measured.get(BATCH_SIZE) if "motion" in stored else None
    return int(found or DEFAULT_BATCH)


def build_columns(
    options: EncodeOptions, stored: Mapping[str, ColumnMeta] | None = None
) -> Sequence[ColumnEncoder]:
    """Load the encoders of `options.columns`, in that order, for a store that has columns.

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
    _require_text_columns(options)
    build = Build(options, stored or {})
    return [
        _text(build, name) if is_text_column(name) else COLUMN_BUILDERS[name](build)
        for name in options.columns
    ]


def _require_text_columns(options: EncodeOptions) -> None:
    """Raise ConfigError for settings of text that no column of the run takes."""
    names = {text_name(column) for column in options.columns if is_text_column(column)}
    for setting in ("preset", "template", "layer"):
        if getattr(options.text, setting) is not None and not names:
            raise ConfigError(f"text {setting} is for columns of text; name one among the columns.")
    for name, _ in options.text.models:
        if name and name not in names:
            raise ConfigError(
                f"text model names {name}, but there is no column text:{name} to make; name it "
                "among the columns."
            )


def describe_column(
    encoder: ColumnEncoder, options: EncodeOptions, buckets: Sequence[Bucket], *, measure: bool
) -> ColumnMeta:
    """Return a column's description; with `measure`, also what its fast way to encode costs."""
    meta = encoder.describe(buckets)
    if options.deinterlaces and encoder.needs & {FRAMES, CONTENT}:
        meta = replace(meta, config={**meta.config, "deinterlace": "bwdif"})
    if options.exact_colours and encoder.needs & {FRAMES, CONTENT}:
        meta = replace(meta, config={**meta.config, "colours": "exact"})
    elif decodes_on_gpu(options.video_backend) and encoder.needs & {FRAMES, CONTENT}:
        meta = replace(meta, config={**meta.config, "colours": "nvdec"})
    if encoder.name == "motion":
        meta = replace(meta, weights=weights_place(options.model, options.weights))
    if encoder.name in options.zstd:
        meta = replace(meta, compression="zstd")
    if measure:
        meta = replace(meta, measured={**meta.measured, **encoder.measure(buckets[0])})
    return meta


def check_column_name(name: str) -> None:
    """Raise ConfigError, naming what was meant, unless there is such a column."""
    if name not in COLUMN_BUILDERS and not is_text_column(name):
        close = get_close_matches(name, COLUMN_BUILDERS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(COLUMN_BUILDERS)}."
        if name.startswith("text:"):
            hint = "write text:NAME, of letters, digits, _ and -, and no _mask at the end."
        raise ConfigError(f"there is no column {name!r}; {hint}")
