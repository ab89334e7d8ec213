"""What is known of a video before any of its clips is decoded: one record, whatever the file is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from reducio_latents.errors import VideoError
from reducio_latents.files.source import VideoSource, open_source
from reducio_latents.video import get_backend
from reducio_latents.video.processes import Channel, ProcessPool
from reducio_latents.video.protocol import VideoBackend

MIN_TIMEOUT_S = 300.0
"""Probing reads a whole file to hash it; a slow disk is no hang."""
_CHUNK_BYTES = 1 << 20

OnProbe = Callable[[int, int], None]
"""Told (videos probed, videos to be)."""


@dataclass(frozen=True, kw_only=True)
class Probing:
    """How videos are probed: by which backend, in how many processes, within which limits."""

    backend: str
    workers: int
    timeout_s: float
    """Raised to `MIN_TIMEOUT_S`."""
    memory_bytes: int = 0
    """Of a process; 0: no limit."""
    preload: tuple[str, ...] = ()
    """See `ProcessPool`."""


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


def probe_videos(
    sources: Sequence[VideoSource], probing: Probing, on_probe: OnProbe = lambda _, __: None
) -> Iterator[ProbeRecord]:
    """Yield the record of each video, in order. One that hangs or kills its prober has an error.

    Raises ConfigError where the backend is not installed.
    """
    if not sources:
        return
    with ProcessPool(
        target=_probe,
        workers=min(probing.workers, len(sources)),
        timeout_s=max(MIN_TIMEOUT_S, probing.timeout_s),
        memory_bytes=probing.memory_bytes,
        preload=probing.preload,
    ) as pool:
        tasks = ((source, probing.backend) for source in sources)
        for number, record, lost in pool.run(tasks):
            on_probe(number + 1, len(sources))
            yield record if lost is None else failed_record(lost)


def _probe(task: tuple[VideoSource, str], channel: Channel) -> None:
    source, backend = task
    channel.emit(probe_video(source, get_backend(backend)))


def _size_and_sha256(source: VideoSource) -> tuple[int, str]:
    with open_source(source) as file:
        try:
            digest = hashlib.sha256()
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
            return file.tell(), digest.hexdigest()
        except OSError as err:
            raise VideoError(f"{source}: it cannot be read: {err.strerror or err}.") from err
