"""The default backend: FFmpeg through PyAV, read so that every frame is the right one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import av
from av.video.reformatter import Interpolation, VideoReformatter

from reducio_latents.errors import VideoError
from reducio_latents.files.source import VideoSource
from reducio_latents.video.assemble import ClipAssembly
from reducio_latents.video.colour import RgbConverter, planes_of
from reducio_latents.video.file import UNDECODABLE, Scan, VideoFile
from reducio_latents.video.interlace import Deinterlacer
from reducio_latents.video.planes import Planes
from reducio_latents.video.playback import Playback, Shown
from reducio_latents.video.protocol import ClipFrames, Frame, Transform, VideoInfo


class PyAVBackend:
    """Reads whatever FFmpeg reads. One decoder thread suits many videos at once; more suit one."""

    name = "pyav"

    def __init__(
        self, *, threads: int = 1, deinterlace: bool = True, as_planes: bool = False
    ) -> None:
        self._threads = threads
        self._deinterlace = deinterlace
        self._as_planes = as_planes

    def probe(self, source: VideoSource, *, alive: Callable[[], None] = lambda: None) -> VideoInfo:
        """See `VideoBackend.probe`. Decodes all of a video whose packets lack times."""
        with VideoFile(source, threads=self._threads) as video:
            scan = video.scan(alive)
            info = info_of(video, scan)
        return info if scan.is_complete else self._decode_through(source, info, alive)

    def _decode_through(
        self, source: VideoSource, info: VideoInfo, alive: Callable[[], None]
    ) -> VideoInfo:
        """Return what the frames say where the packets do not."""
        frames, end_s, lost_s, why = 0, 0.0, 0.0, ""
        with VideoFile(source, threads=self._threads) as video:
            playback = Playback(video, deinterlace=self._deinterlace)
            for shown in playback.play():
                frames, end_s = frames + 1, shown.until_s
                if shown.trouble is not None:
                    lost_s, why = lost_s + shown.until_s - shown.at_s, why or shown.trouble
                alive()
            if not frames:
                raise video.error(UNDECODABLE)
            note = video.note
        if why:
            note = f"{lost_s:.3f} s of it are lost, and {playback.left_out} frames more: {why}"
        return replace(info, frames=frames, duration_s=end_s, rate_fps=frames / end_s, note=note)

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
        clips, given = ClipAssembly(source, starts_s, **asked), 0
        if clips.next_s is None:
            return
        try:
            with VideoFile(source, threads=self._threads) as video:
                playback = Playback(video, deinterlace=self._deinterlace, wants=clips.wants)
                for clip in _read(video, clips, playback, as_planes=self._as_planes):
                    if clips.has_trouble and playback.skipped and isinstance(clip, VideoError):
                        break
                    yield clip
                    given += 1
                else:
                    return
                # Whatever is wrong, it is not that frames were left out.
                clips = ClipAssembly(source, starts_s[given:], **asked)
                video.open()
                playback = Playback(video, deinterlace=self._deinterlace)
                yield from _read(video, clips, playback, as_planes=self._as_planes)
        except VideoError as err:
            yield from clips.fail_rest(str(err).removeprefix(f"{source}: ").rstrip("."))


def info_of(video: VideoFile, scan: Scan) -> VideoInfo:
    """Put together what a scan of a video told."""
    try:
        width, height = video.shown_size(scan.first)
        orientation = video.orientation(scan.first)
    except VideoError as err:
        raise video.error(str(err)) from err
    return VideoInfo(
        codec=video.codec,
        pix_fmt=scan.first.format.name,
        width=width,
        height=height,
        rotation=orientation.rotation,
        mirrored=orientation.mirrored,
        rate_fps=scan.frames / scan.duration_s if scan.is_complete else 0.0,
        duration_s=scan.duration_s,
        frames=scan.frames,
        note=scan.note,
    )


def _read(
    video: VideoFile, clips: ClipAssembly, playback: Playback, *, as_planes: bool
) -> Iterator[ClipFrames | VideoError]:
    converter, deinterlacer = RgbConverter(), Deinterlacer()
    playing = playback.play()
    end_s: float | None = None
    sought_s: float | None = None
    while (shown := next(playing, None)) is not None:
        end_s = shown.until_s
        picture = partial(_picture, video, converter, deinterlacer, shown, as_planes=as_planes)
        yield from clips.show(picture, shown.at_s, shown.before_s, trouble=shown.trouble)
        if clips.next_s is None:
            return
        if clips.next_s != sought_s and playback.is_worth_seeking(shown.until_s, clips.next_s):
            sought_s = clips.next_s
            playing = playback.approach(sought_s)
    if end_s is None:
        raise video.error(UNDECODABLE)
    yield from clips.fail_rest(f"it runs past the end of the video, at {end_s:.3f} s")


def _picture(
    video: VideoFile,
    converter: RgbConverter,
    deinterlacer: Deinterlacer,
    shown: Shown,
    *,
    as_planes: bool,
) -> Frame | Planes:
    """Return a decoded frame as it is shown."""
    frame = shown.frame
    orientation = video.orientation(frame)
    try:
        if shown.neighbours is not None:
            frame = deinterlacer.convert(shown.neighbours[0], frame, shown.neighbours[1])
        width = video.scaled_width(frame)
        if as_planes and width == frame.width:
            planes = planes_of(frame, orientation)
            if planes is not None:
                return planes
        stored = converter.convert(frame, width)
    except (av.FFmpegError, ValueError, MemoryError) as err:
        raise VideoError(f"a {frame.format.name} picture cannot be made RGB ({err})") from err
    return orientation.apply(stored)


class SmallFrame(NamedTuple):
    """A frame of a video, made small."""

    at_s: float
    until_s: float
    """When the next one appears; for the last, when the video ends."""
    picture: Frame


def small_frames(source: VideoSource, height: int, width: int) -> Iterator[SmallFrame]:
    """Yield every frame of a video in one pass, squeezed to `height` x `width`, as it is stored.

    Neither turned nor of exact colours: for what looks at how pictures change. Raises VideoError if
    it cannot be read or has no frame that can be decoded.
    """
    reformatter, is_empty = VideoReformatter(), True
    with VideoFile(source) as video:
        for shown in Playback(video, deinterlace=False).play():
            is_empty = False
            try:
                small = reformatter.reformat(
                    shown.frame, width, height, "rgb24", interpolation=Interpolation.AREA
                )
                picture: Any = small.to_ndarray()
            except (av.FFmpegError, ValueError, MemoryError) as err:
                raise video.error(f"its pictures cannot be made RGB ({err})") from err
            yield SmallFrame(shown.at_s, shown.until_s, picture)
        if is_empty:
            raise video.error(UNDECODABLE)
