"""What is known of a video before any of its clips is decoded: one record, whatever the file is."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from reducio_latents.errors import VideoError
from reducio_latents.video.protocol import VideoBackend
from reducio_latents.video.source import VideoSource, open_source

_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class ProbeRecord:
    """A video as the plan keeps it. Where `error` is set, everything that is not known is 0."""

    codec: str = ""
    width: int = 0
    """As shown: after sample aspect ratio and rotation."""
    height: int = 0
    rotation: int = 0
    """Degrees clockwise: 0, 90, 180 or 270."""
    rate_fps: float = 0.0
    """True mean rate: shown frames / duration."""
    duration_s: float = 0.0
    """From the first shown frame to the end of the last."""
    frames: int = 0
    bytes: int = 0
    sha256: str = ""
    """Of the video's bytes, in hexadecimal; "" if they cannot be read to the end."""
    error: str | None = None
    """Why no clip can be had of it; None for a healthy video."""


def failed_record(error: str, *, bytes: int = 0, sha256: str = "") -> ProbeRecord:
    """Return the record of a video that cannot be used."""
    return ProbeRecord(error=error, bytes=bytes, sha256=sha256)


def probe_video(source: VideoSource, backend: VideoBackend) -> ProbeRecord:
    """Describe the video and hash its bytes; a video that cannot be read has an `error`.

    Reads the whole file once for the hash and once for its packets, and decodes the first frame.
    """
    size, digest = 0, ""
    try:
        size, digest = _size_and_sha256(source)
        info = backend.probe(source)
    except VideoError as err:
        return failed_record(str(err), bytes=size, sha256=digest)
    return ProbeRecord(
        codec=info.codec,
        width=info.width,
        height=info.height,
        rotation=info.rotation,
        rate_fps=info.rate_fps,
        duration_s=info.duration_s,
        frames=info.frames,
        bytes=size,
        sha256=digest,
    )


def _size_and_sha256(source: VideoSource) -> tuple[int, str]:
    with open_source(source) as file:
        try:
            digest = hashlib.sha256()
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
            return file.tell(), digest.hexdigest()
        except OSError as err:
            raise VideoError(f"{source}: it cannot be read: {err.strerror or err}.") from err
