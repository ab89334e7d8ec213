"""Reading clips out of videos, exactly: backends behind one small Protocol."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable

from reducio_latents.errors import ConfigError
from reducio_latents.files.source import VideoSource
from reducio_latents.video.protocol import ClipFrames, VideoBackend, VideoInfo

__all__ = [
    "BACKENDS",
    "ClipFrames",
    "VideoBackend",
    "VideoInfo",
    "VideoSource",
    "backend_for",
    "get_backend",
]


def _pyav(threads: int, deinterlace: bool, as_planes: bool) -> VideoBackend:
    from reducio_latents.video.pyav import PyAVBackend

    return PyAVBackend(threads=threads, deinterlace=deinterlace, as_planes=as_planes)


def _decord(threads: int, deinterlace: bool, as_planes: bool) -> VideoBackend:
    from reducio_latents.video.decord import DecordBackend

    return DecordBackend(threads=threads, deinterlace=deinterlace)


def _torchcodec(threads: int, deinterlace: bool, as_planes: bool) -> VideoBackend:
    from reducio_latents.video.torchcodec import TorchcodecBackend

    return TorchcodecBackend(threads=threads, deinterlace=deinterlace)


BACKENDS: dict[str, Callable[[int, bool, bool], VideoBackend]] = {
    "pyav": _pyav,
    "decord": _decord,
    "torchcodec": _torchcodec,
}
"""pyav: reads everything that FFmpeg does. The others refuse what they cannot read exactly;
torchcodec decodes on a GPU where there is one."""


def decodes_on_gpu(name: str) -> bool:
    """Whether a backend's pictures are a GPU's, which round colours otherwise than a CPU's."""
    import torch

    return name == "torchcodec" and torch.cuda.is_available()


EXTRAS = {"torchcodec": "torchcodec"}
"""What to install for a backend; `encode` for others."""
GIVE_PLANES = frozenset({"pyav"})
"""Backends that can hand frames over as planes of YUV; others give RGB alone."""


PICTURE = ".image"
"""What is added to the name of a picture that has none of its kind, as in a table."""
MOVING_EXTENSIONS = frozenset({".avif", ".png", ".webp", PICTURE})
"""Of pictures that may prove to be animations."""
# fmt: off
STILL_EXTENSIONS = MOVING_EXTENSIONS | {
    ".bmp", ".heic", ".heif", ".jfif", ".jpe", ".jpeg", ".jpg", ".jxl", ".tif", ".tiff",
}
# fmt: on
"""What makes a file a picture. Those that Pillow cannot read fail with that reason."""


def is_still_name(name: str) -> bool:
    """Whether a file, or an address without its query, is a picture by its name."""
    return _ending(name) in STILL_EXTENSIONS


def may_move(name: str) -> bool:
    """Whether a picture of this name may prove to be an animation."""
    return _ending(name) in MOVING_EXTENSIONS


def _ending(name: str) -> str:
    path = name.partition("?")[0] if "://" in name else name
    return posixpath.splitext(path)[1].lower()


def backend_for(
    video: str, name: str, *, deinterlace: bool = True, as_planes: bool = False
) -> VideoBackend:
    """Return what reads a file that is called `video`: the backend `name`, or one for pictures."""
    # First, as it says what is not installed.
    videos = get_backend(name, deinterlace=deinterlace, as_planes=as_planes)
    if not is_still_name(video):
        return videos
    from reducio_latents.video.still import StillBackend

    return StillBackend(videos)


def get_backend(
    name: str, *, threads: int = 1, deinterlace: bool = True, as_planes: bool = False
) -> VideoBackend:
    """Return a backend by its name in `BACKENDS`; it uses `threads` decoder threads per video.

    With `deinterlace`, frames that a stream calls interlaced are made whole; see `interlace`. With
    `as_planes` it gives a `transform` ordinary 8-bit frames as `planes.Planes`.
    A ConfigError names the extra to install where the backend's library is missing.
    """
    if name not in BACKENDS:
        raise ConfigError(f"video backend is {name!r}; choose one of {', '.join(BACKENDS)}.")
    if as_planes and name not in GIVE_PLANES:
        raise ConfigError(
            f"video backend {name} gives RGB alone, so colours cannot be `exact`. Use pyav, or "
            "write to a new store."
        )
    if threads < 1:
        raise ConfigError(f"video decoder threads must be >= 1, got {threads}.")
    try:
        return BACKENDS[name](threads, deinterlace, as_planes)
    except (ImportError, OSError, RuntimeError) as err:  # torchcodec without FFmpeg's libraries
        also = ", and FFmpeg 4 to 8 with its shared libraries" if name == "torchcodec" else ""
        why = re.split(r"\n|\. ", str(err))[0]
        raise ConfigError(
            f"the {name} video backend cannot be imported ({why}). "
            f"Install it: pip install 'reducio-latents[{EXTRAS.get(name, 'encode')}]'{also}."
        ) from err
