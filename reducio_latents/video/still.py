"""Still pictures as videos of one frame: JPEG, PNG, WebP, AVIF, BMP and TIFF, read by Pillow.

They are shown as browsers do it: turned as their EXIF says, colours brought to sRGB by the profile
that they carry, 16 bits a sample made 8; transparent ones are laid on black, as videos are.
PNG and AVIF files that move are left to the backend for videos; of WebP FFmpeg knows none that do.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from reducio_latents.core.clips import TIME_TOLERANCE_S
from reducio_latents.errors import VideoError
from reducio_latents.files.source import VideoSource, open_source
from reducio_latents.video.assemble import ClipAssembly
from reducio_latents.video.colour import on_black
from reducio_latents.video.orientation import Orientation
from reducio_latents.video.protocol import (
    ClipFrames,
    Frame,
    Transform,
    VideoBackend,
    VideoInfo,
)

STILL_DURATION_S = 2 * TIME_TOLERANCE_S
"""A picture has room for one frame at any rate, and for no clip of two."""
MAX_STILL_PX = 1 << 27
"""A larger picture is not decoded: 134 megapixels take 400 MB, and some steps twice that."""
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "TIFF")
_ORIENTATION_TAG = 0x0112
_ORIENTATIONS = {
    2: Orientation(flip_columns=True),
    3: Orientation(flip_rows=True, flip_columns=True),
    4: Orientation(flip_rows=True),
    5: Orientation(transpose=True),
    6: Orientation(transpose=True, flip_columns=True),
    7: Orientation(transpose=True, flip_rows=True, flip_columns=True),
    8: Orientation(transpose=True, flip_rows=True),
}
"""EXIF 2.32, tag 0x0112; 1 and what is no such number: as it is stored."""
_EIGHT_BIT = {"1": "L", "L": "L", "CMYK": "CMYK", "LA": "LA", "La": "LA", "RGBA": "RGBA",
              "RGBa": "RGBA", "PA": "RGBA"}  # fmt: skip
"""Mode of a picture -> the one that it is worked on in; others are made RGB."""
_DEEP = ("I", "F")
"""Modes whose samples have no known range."""


class StillBackend:
    """Reads still pictures; what moves is read by the backend that it is given."""

    name = "pillow"

    def __init__(self, videos: VideoBackend) -> None:
        self._videos = videos

    def probe(self, source: VideoSource, *, alive: Callable[[], None] = lambda: None) -> VideoInfo:
        """See `VideoBackend.probe`. Reads the head alone."""
        with _opened(source) as image:
            if image is not None:
                orientation = _orientation(image)
                width, height = orientation.size(*image.size)
                frames, duration_s = 0, 0.0
                for _, end_s in _times(image):
                    frames, duration_s = frames + 1, end_s
                    alive()
                return VideoInfo(
                    codec=str(image.format).lower(),
                    pix_fmt=image.mode,
                    width=width,
                    height=height,
                    rotation=orientation.rotation,
                    mirrored=orientation.mirrored,
                    rate_fps=0.0 if frames == 1 else frames / duration_s,
                    duration_s=duration_s,
                    frames=frames,
                )
        return self._videos.probe(source, alive=alive)

    def read_clips(
        self,
        source: VideoSource,
        starts_s: Sequence[float],
        *,
        frames: int,
        rate_fps: float,
        transform: Transform | None = None,
    ) -> Iterator[ClipFrames | VideoError]:
        """See `VideoBackend.read_clips`."""
        asked: dict[str, Any] = {"frames": frames, "rate_fps": rate_fps, "transform": transform}
        clips = ClipAssembly(source, starts_s, **asked)
        try:
            with _opened(source) as image:
                if image is None:
                    yield from self._videos.read_clips(source, starts_s, **asked)
                    return
                end_s = 0.0
                for at_s, end_s in _times(image):
                    yield from clips.show(lambda: _shown(image), at_s, end_s)
            is_still = end_s == STILL_DURATION_S
            rest = "it is a picture, of one frame" if is_still else f"it ends at {end_s:.3f} s"
            yield from clips.fail_rest(rest)
        except VideoError as err:
            yield from clips.fail_rest(str(err).removeprefix(f"{source}: ").rstrip("."))


@contextmanager
def _opened(source: VideoSource) -> Iterator[Image.Image | None]:
    """Open a picture; None for an animation. Raise VideoError if its head cannot be read."""
    with open_source(source) as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of many pixels and odd tags: judged below
                image = Image.open(file, formats=_FORMATS)
                pages = getattr(image, "n_frames", 1)
        except Image.DecompressionBombError as err:
            raise VideoError(f"{source}: it has too many pixels: {err}") from err
        # Its readers raise what they like about a damaged head, and of bombs an error of its own.
        except Exception as err:
            known = "JPEG, PNG, WebP, AVIF, BMP or TIFF"
            raise VideoError(f"{source}: it is no {known} picture, or it is damaged.") from err
        with image:
            if image.width * image.height > MAX_STILL_PX:
                raise VideoError(
                    f"{source}: it has {image.width}x{image.height} pixels, more than "
                    f"{MAX_STILL_PX >> 20} Mi."
                )
            if image.format == "TIFF" and pages > 1:
                raise VideoError(f"{source}: it has {pages} pages, and is not one picture.")
            # An MPO holds other views of the same picture; the first is the one to show.
            yield None if pages > 1 and image.format not in ("MPO", "WEBP") else image


def _times(image: Image.Image) -> Iterator[tuple[float, float]]:
    """Go through the frames of a picture; yield when each one, which it is at then, is shown.

    Raise VideoError for one that cannot be decoded.
    """
    pages = getattr(image, "n_frames", 1)
    if image.format != "WEBP" or pages == 1:
        yield 0.0, STILL_DURATION_S
        return
    at_ms = 0
    for number in range(pages):
        try:
            image.seek(number)
            image.load()
        except Exception as err:  # as above
            raise VideoError(f"frame {number} cannot be decoded ({err})") from err
        # As browsers show what gives no time, or next to none.
        lasts_ms = int(image.info.get("duration", 0))
        lasts_ms = 100 if lasts_ms <= 10 else lasts_ms
        yield at_ms / 1000, (at_ms + lasts_ms) / 1000
        at_ms += lasts_ms


def _orientation(image: Image.Image) -> Orientation:
    # EXIF that cannot be read says nothing; viewers then show the picture as it is stored.
    with suppress(Exception):
        return _ORIENTATIONS.get(image.getexif().get(_ORIENTATION_TAG, 1), Orientation())
    return Orientation()


def _shown(image: Image.Image) -> Frame:
    """Return the picture as it is shown; raise VideoError if it cannot be decoded."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image.load()
            return _orientation(image).apply(_rgb(image))
    except VideoError:
        raise
    except Exception as err:  # as above
        raise VideoError(f"it cannot be decoded ({err})".replace("\n", " ")) from err


def _rgb(image: Image.Image) -> Frame:
    deep = image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG")
    if image.mode in _DEEP and not deep:
        raise VideoError(
            f"its samples ({image.mode}) have no known range; save it with 8 or 16 bits"
        )
    profile = image.info.get("icc_profile")
    if deep:
        samples = np.asarray(image).astype(np.uint32)
        image = Image.fromarray(((samples * 255 + 32767) // 65535).astype(np.uint8))
    elif "transparency" in image.info:
        image = image.convert("RGBA")
    elif image.mode != "RGB":
        image = image.convert(_EIGHT_BIT.get(image.mode, "RGB"))
    opacity = image.getchannel("A") if image.mode in ("LA", "RGBA") else None
    colours = image.convert(image.mode.removesuffix("A")) if opacity is not None else image
    rgb = np.array(_to_srgb(colours, profile).convert("RGB"))
    if opacity is None:
        return rgb
    return on_black(np.dstack([rgb, np.asarray(opacity)]))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Return the colours that a profile says, as sRGB.

    A profile that is damaged, or of another kind of picture, is passed over, as browsers do it.
    """
    if profile:
        with suppress(ImageCms.PyCMSError, OSError, ValueError, TypeError):
            given = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "srgb" not in ImageCms.getProfileDescription(given).lower():
                srgb = ImageCms.createProfile("sRGB")
                found = ImageCms.profileToProfile(image, given, srgb, outputMode="RGB")
                return image if found is None else found
    return image
