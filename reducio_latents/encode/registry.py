"""Column encoders by name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from difflib import get_close_matches

from reducio_latents.encode.columns import (
    CaptionColumn,
    ColumnEncoder,
    ContentImageColumn,
    FrameTimesColumn,
    MotionColumn,
)
from reducio_latents.encode.options import EncodeOptions
from reducio_latents.errors import ConfigError


def _motion(options: EncodeOptions) -> ColumnEncoder:
    import torch

    from reducio_latents.autoencoders import load_autoencoder

    on_gpu = torch.device(options.torch_device).type == "cuda"
    autoencoder = load_autoencoder(
        options.model,
        options.weights,
        device=options.torch_device,
        dtype=getattr(torch, options.dtype),
        tiling="auto" if options.tiling == "auto" else None,
        parts="encoder",
        compile=options.compile,
        memory_format=torch.channels_last_3d if on_gpu else torch.contiguous_format,
    )
    return MotionColumn(autoencoder, options.resize)


def _content_image(options: EncodeOptions) -> ColumnEncoder:
    return ContentImageColumn(options.image_codec, options.resize)


def _caption(options: EncodeOptions) -> ColumnEncoder:
    return CaptionColumn()


def _frame_times(options: EncodeOptions) -> ColumnEncoder:
    return FrameTimesColumn(options.video_backend)


COLUMN_BUILDERS: dict[str, Callable[[EncodeOptions], ColumnEncoder]] = {
    "motion": _motion,
    "content_image": _content_image,
    "caption": _caption,
    "frame_times": _frame_times,
}


def build_columns(options: EncodeOptions) -> Sequence[ColumnEncoder]:
    """Load the encoders of `options.columns`, in that order.

    Raise ConfigError for a name that there is not, or one that is given twice.
    """
    for name in options.columns:
        if name not in COLUMN_BUILDERS:
            close = get_close_matches(name, COLUMN_BUILDERS, n=1)
            hint = (
                f"did you mean {close[0]!r}?" if close else f"known: {', '.join(COLUMN_BUILDERS)}."
            )
            raise ConfigError(f"there is no column {name!r}; {hint}")
        if options.columns.count(name) > 1:
            raise ConfigError(f"column {name!r} is given twice.")
    return [COLUMN_BUILDERS[name](options) for name in options.columns]
