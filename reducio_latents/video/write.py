"""Pixels to files that anyone can play, for looking at what was decoded."""

from __future__ import annotations

import os
from contextlib import suppress
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from reducio_latents.errors import ConfigError, VideoError

WEBP_QUALITY = 90
CRF = "16"
"""x264's quality; at this one compression cannot be told from what a VAE leaves out."""


def write_mp4(
    path: str | Path, frames_THWC: NDArray[np.uint8], rate_fps: float, *, crf: str = CRF
) -> None:
    """Write uint8 RGB (T, H, W, 3) as H.264 in an MP4 that browsers play, replacing `path`.

    Odd sides are extended by their last row or column, as 4:2:0 needs even ones. The file appears
    whole or not at all. Raise VideoError if it cannot be written.
    """
    if frames_THWC.dtype != np.uint8 or frames_THWC.ndim != 4 or frames_THWC.shape[3] != 3:
        raise VideoError(
            f"{path}: expected uint8 (T, H, W, 3), got {frames_THWC.dtype} {frames_THWC.shape}."
        )
    if not len(frames_THWC):
        raise VideoError(f"{path}: there are no frames to write.")
    target = Path(path)
    # Beside its target, so that the rename stays on one file system; the name keeps its ending,
    # by which the container is chosen.
    partial = target.with_name(f".{os.getpid()}.{target.name}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _encode(partial, frames_THWC, rate_fps, crf)
        partial.replace(target)
    except OSError as err:
        raise VideoError(f"{path} cannot be written: {err.strerror or err}.") from err
    finally:
        with suppress(OSError):  # it is not there, or its folder is none
            partial.unlink()


def write_webp(path: str | Path, frames_THWC: NDArray[np.uint8], rate_fps: float) -> None:
    """Write uint8 RGB (T, H, W, 3) as an animated WebP that repeats for ever, replacing `path`.

    Frames last whole milliseconds each, as the format has it; their sum is the clip's to 1 ms. The
    file appears whole or not at all. Raise VideoError if it cannot be written.
    """
    if not len(frames_THWC):
        raise VideoError(f"{path}: there are no frames to write.")
    ends = [round(1000 * (number + 1) / rate_fps) for number in range(len(frames_THWC))]
    lasting = [end - start for start, end in pairwise([0, *ends])]
    first, *rest = (Image.fromarray(frame) for frame in frames_THWC)
    _save(
        first,
        Path(path),
        format="WEBP",
        save_all=True,
        append_images=rest,
        duration=lasting,
        loop=0,
        quality=WEBP_QUALITY,
        method=4,
    )


def write_image(path: str | Path, picture_HWC: NDArray[np.uint8]) -> None:
    """Write uint8 RGB (H, W, 3) as an image in the format of the file's ending, replacing `path`.

    The file appears whole or not at all. Raise VideoError if it cannot be written.
    """
    _save(Image.fromarray(picture_HWC), Path(path))


def _save(image: Image.Image, path: Path, **settings: Any) -> None:
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(partial, **settings)
        partial.replace(path)
    except (OSError, ValueError, TypeError) as err:  # also an ending that Pillow does not know
        raise VideoError(f"{path} cannot be written: {err}.") from err
    finally:
        with suppress(OSError):  # it is not there, or its folder is none
            partial.unlink()


def _encode(path: Path, frames_THWC: NDArray[np.uint8], rate_fps: float, crf: str) -> None:
    try:
        import av
    except ImportError as err:
        raise ConfigError(
            "writing video needs PyAV: pip install 'reducio-latents[encode]'."
        ) from err
    height, width = frames_THWC.shape[1:3]
    padding = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))
    even = np.pad(frames_THWC, padding, mode="edge")
    options = {"crf": crf, "preset": "medium"}
    try:
        with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as file:
            rate = Fraction(rate_fps).limit_denominator(1001)
            stream = file.add_stream("libx264", rate=rate, options=options)
            stream.height, stream.width = even.shape[1:3]
            stream.pix_fmt = "yuv420p"
            _tag_bt709(stream.codec_context)
            for frame in even:
                picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                file.mux(stream.encode(_to_bt709(picture)))
            file.mux(stream.encode(None))
    except av.FFmpegError as err:  # some of these are an OSError already, some are not
        raise OSError(getattr(err, "errno", None), str(err.strerror)) from err


def _tag_bt709(codec: Any) -> None:
    """Say how the numbers are meant, or players guess it from the size of the picture."""
    codec.color_range, codec.colorspace, codec.color_primaries, codec.color_trc = 1, 1, 1, 1


def _to_bt709(picture: Any) -> Any:
    from av.video.reformatter import Interpolation

    return picture.reformat(
        format="yuv420p",
        dst_colorspace=1,
        src_color_range=2,
        dst_color_range=1,
        interpolation=Interpolation.BICUBIC | Interpolation.ACCURATE_RND,
    )
