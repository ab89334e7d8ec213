"""What is known of a video before any of its clips is decoded: one record, whatever the file is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field, replace

from reducio_latents.core.text import printable
from reducio_latents.corpus.entry import CorpusVideo
from reducio_latents.corpus.shots import ShotSource, VideoShots, detect
from reducio_latents.errors import VideoError
from reducio_latents.files.source import VideoSource
from reducio_latents.video import backend_for
from reducio_latents.video.identity import size_and_sha256, stamp_of
from reducio_latents.video.processes import Channel, ProcessPool
from reducio_latents.video.protocol import VideoBackend

log = logging.getLogger(__name__)
OnProbe = Callable[[int, int], None]
"""Told (videos probed, videos to be)."""
OnRecord = Callable[[str, "ProbeRecord"], None]
"""Told the name and the record of each video as it comes."""


@dataclass(frozen=True, kw_only=True)
class Probing:
    """How videos are probed: by which backend, in how many processes, within which limits."""

    backend: str
    workers: int
    timeout_s: float
    """How long a video may bring nothing: not a byte to hash, not a packet, not its first frame."""
    deinterlace: bool = True
    """A back-end that cannot refuses interlaced videos."""
    memory_bytes: int = 0
    """Of a process; 0: no limit."""
    shots: ShotSource = field(default_factory=ShotSource)
    """What says where shots end."""


@dataclass(frozen=True, kw_only=True, slots=True)
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
    shots: VideoShots | None = None
    """None where they are not looked for."""
    note: str = field(default="", compare=False)
    """What a user should know of it; told in the run that probed, and not kept."""
    stamp: str = field(default="", compare=False)
    """See `stamp_of`, before the bytes were hashed. Known in the run that probed, and not kept."""


PROBED = ("codec", "width", "height", "rotation", "rate_fps", "duration_s", "frames")


def probe_video(
    source: VideoSource, backend: VideoBackend, alive: Callable[[], None] = lambda: None
) -> ProbeRecord:
    """Describe the video and hash its bytes; a video that cannot be read has an `error`.

    Reads the whole file once for the hash and once for its packets, and decodes the first frame;
    `alive` is called in between.
    """
    stamp, size, digest = stamp_of(source), 0, ""
    try:
        size, digest = size_and_sha256(source, alive)
        info = backend.probe(source, alive=alive)
    except VideoError as err:
        return ProbeRecord(error=str(err), bytes=size, sha256=digest)
    known = {name: getattr(info, name) for name in (*PROBED, "note")}
    return ProbeRecord(bytes=size, sha256=digest, stamp=stamp, **known)


def probe_videos(
    videos: Sequence[CorpusVideo], probing: Probing, on_probe: OnProbe = lambda _, __: None
) -> Generator[ProbeRecord]:
    """Yield the record of each video, in order. One that hangs or kills its prober has an error.

    One on which the detector of shots does that has none, and why. What the listing knows to be bad
    is not opened. Raises ConfigError where the backend or the detector is not installed.
    """
    good = sum(video.problem is None for video in videos)
    if not good:
        yield from (ProbeRecord(error=video.problem or "") for video in videos)
        return
    on_probe(len(videos) - good, len(videos))
    with ProcessPool(
        target=_probe,
        workers=min(probing.workers, good),
        timeout_s=probing.timeout_s,
        memory_bytes=probing.memory_bytes,
    ) as pool:
        lean = replace(probing, shots=replace(probing.shots, table=None))  # it may be large
        readable = (video for video in videos if video.problem is None)
        found = pool.run((video.video, video.source, lean) for video in readable)
        done = len(videos) - good
        for video in videos:
            if video.problem is not None:
                yield ProbeRecord(error=video.problem)
                continue
            _, record, lost = next(found)
            if lost is not None:
                record = _without_shots(record, lost)
            if probing.shots.table is not None and record.frames > 1:
                told = probing.shots.table.of(video, record.duration_s, record.rate_fps)
                record = replace(record, shots=told)
            if record.note:
                log.warning("%s: %s.", printable(video.video), record.note)
            done += 1
            on_probe(done, len(videos))
            yield record


def _without_shots(record: ProbeRecord | None, lost: str) -> ProbeRecord:
    """Return what is known of a video whose prober was lost: all but the shots, if any."""
    if record is None:
        return ProbeRecord(error=lost)
    by = "" if record.shots is None else record.shots.by
    why = lost.replace("the decoder", "the detector")
    return replace(record, shots=VideoShots(by, problem=why))


def _probe(task: tuple[str, VideoSource, Probing], channel: Channel) -> None:
    video, source, probing = task
    backend = backend_for(video, probing.backend, deinterlace=probing.deinterlace)
    record = probe_video(source, backend, channel.alive)
    channel.emit(record)
    detector = probing.shots.detector
    if detector is not None and record.frames > 1:
        channel.emit(
            replace(record, shots=detect(source, detector, record.duration_s, channel.alive))
        )
