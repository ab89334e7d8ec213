"""The second backend: decord. It refuses what it cannot read exactly, and says so.

decord gives frames by index. Which index is shown when is taken from the file's packets, and decord
must agree with them. It decodes from the start, and seeks only where every group of pictures is
closed. Unlike PyAV it does not tell of damage that its decoder conceals.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import decord
import numpy as np

from reducio_latents.errors import VideoError
from reducio_latents.files.source import VideoSource, open_source
from reducio_latents.video.assemble import ClipAssembly
from reducio_latents.video.colour import BT601, BT709, ColourTags, RgbConverter
from reducio_latents.video.file import Scan, VideoFile
from reducio_latents.video.protocol import ClipFrames, Frame, Transform, VideoInfo
from reducio_latents.video.pyav import info_of

_CONTAINERS = ("mov", "matroska", "avi", "flv", "asf")
"""In others decord's frame numbers or seeks are wrong, or it cannot tell times."""
_CODECS_IT_LACKS = ("av1", "vvc")
_CODECS_IT_SEEKS = ("h264", "vp8", "vp9", "mpeg4", "mjpeg", "ffv1")
_WORTH_SEEKING_S = 1.0
_LARGEST_DISAGREEMENT_S = 5e-4  # decord's times are float32
_ANY_FAULT = 1e-9
"""Share of frames that decord may replace by others before it raises."""
_BAND_PIXELS = 1 << 15
_YCC_TO_RGB = {
    BT601: np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]]),
    BT709: np.array([[1, 0, 1.5748], [1, -0.187324, -0.468124], [1, 1.8556, 0]]),
}
_601_TO_709 = (_YCC_TO_RGB[BT709] @ np.linalg.inv(_YCC_TO_RGB[BT601])).astype(np.float32)
"""RGB that was made by the matrix of BT.601 -> what that of BT.709 gives."""


@dataclass(frozen=True)
class _Facts:
    """What the packets and the first frame of a video say."""

    info: VideoInfo
    times_s: list[float]
    """When each frame is shown, ascending."""
    rounding_s: float
    keys: list[int]
    """Key frames, ascending; none if decord must not seek in this file."""
    decoded_size: tuple[int, int]
    """(width, height) of what decord gives: turned, but not scaled."""
    recolour: bool
    """decord takes what is untagged for BT.601; this is not."""


class DecordBackend:
    """Reads ordinary 8-bit H.264, HEVC, VP9 and older codings in MP4, MKV, WebM, AVI and FLV."""

    name = "decord"

    def __init__(self, *, threads: int = 1, deinterlace: bool = True) -> None:
        self._threads = threads
        self._deinterlace = deinterlace

    def probe(self, source: VideoSource, *, alive: Callable[[], None] = lambda: None) -> VideoInfo:
        """See `VideoBackend.probe`; the numbers are PyAV's. Refuses what cannot be read."""
        facts = _facts(source, self._deinterlace, alive)
        _Pictures(source, facts, self._threads)
        return facts.info

    def read_clips(
        self,
        source: VideoSource,
        starts_s: Sequence[float],
        *,
        frames: int,
        rate_fps: float,
        transform: Transform | None = None,
    ) -> Iterator[ClipFrames | VideoError]:
        """See `VideoBackend.read_clips`. After an error of the decoder the rest fails too."""
        clips = ClipAssembly(
            source, starts_s, frames=frames, rate_fps=rate_fps, transform=transform
        )
        if clips.next_s is None:
            return
        try:
            facts = _facts(source, self._deinterlace)
            pictures = _Pictures(source, facts, self._threads)
            yield from _read(pictures, facts, clips)
        except VideoError as err:
            yield from clips.fail_rest(str(err).removeprefix(f"{source}: ").rstrip("."))


def _read(
    pictures: _Pictures, facts: _Facts, clips: ClipAssembly
) -> Iterator[ClipFrames | VideoError]:
    times = facts.times_s
    while (wanted_s := clips.next_s) is not None and wanted_s < facts.info.duration_s:
        index = bisect_right(times, wanted_s + facts.rounding_s) - 1
        is_last = index + 1 == len(times)
        before_s = facts.info.duration_s if is_last else times[index + 1] - facts.rounding_s
        yield from clips.show(partial(pictures.get, index), times[index], before_s)
    yield from clips.fail_rest(
        f"it runs past the end of the video, at {facts.info.duration_s:.3f} s"
    )


def _facts(
    source: VideoSource, deinterlace: bool, alive: Callable[[], None] = lambda: None
) -> _Facts:
    """Look at a video without decord; raise VideoError if decord is not to be trusted with it."""
    with VideoFile(source) as video:
        scan = video.scan(alive)
        try:
            orientation = video.orientation(scan.first)
            tags = ColourTags.of(scan.first)
        except VideoError as err:
            raise video.error(str(err)) from err
        why = _why_refused(video, scan, tags) or ("mirror pictures" * orientation.mirrored)
        if not why and deinterlace and video.may_be_interlaced(scan.first):
            why = "deinterlace, and this video may have interlaced frames"
        if why:
            raise _refusal(source, why)
        times = sorted(scan.times_s)
        return _Facts(
            info=info_of(video, scan),
            times_s=times,
            rounding_s=video.rounding_s,
            keys=_closed_keys(scan, times) if video.codec in _CODECS_IT_SEEKS else [],
            decoded_size=orientation.size(scan.first.width, scan.first.height),
            recolour=not tags.is_tagged and tags.matrix == BT709,
        )


def _why_refused(video: VideoFile, scan: Scan, tags: ColourTags) -> str | None:
    """Complete the sentence `decord cannot ...`, or return None."""
    layout = scan.first.format
    if video.codec in _CODECS_IT_LACKS:
        return f"decode {video.codec}"
    if video.format not in _CONTAINERS:
        return f"find exact frames in {video.format} files"
    if scan.discarded:
        return "follow the edit list of this file"
    if not scan.is_complete or scan.frames != len(scan.times_s) or min(scan.times_s) < 0:
        return "tell which packets of this file are frames"
    if not tags.is_ordinary or tags.matrix not in (BT601, BT709, None):
        return "convert HDR or BT.2020 colours"
    if max(part.bits for part in layout.components) > 8 or layout.has_palette:
        return f"convert {layout.name} pictures exactly"
    if any(part.is_alpha for part in layout.components):
        return "read transparent pictures"
    return None


def _refusal(source: VideoSource, what: str) -> VideoError:
    return VideoError(f"{source}: decord cannot {what}: use --video-backend pyav.")


def _closed_keys(scan: Scan, times: list[float]) -> list[int]:
    """Return the index of each key frame, or none at all if an earlier frame is stored after one:
    decord would start there, without what that frame refers to.
    """
    keys, found, earliest = set(scan.keys), [], float("inf")
    for place in reversed(range(len(scan.times_s))):
        at_s = scan.times_s[place]
        if place in keys and at_s > earliest:
            return []
        if place in keys:
            found.append(bisect_right(times, at_s) - 1)
        earliest = min(earliest, at_s)
    return found[::-1]


class _Pictures:
    """One open decord reader; gives frames by ascending index."""

    def __init__(self, source: VideoSource, facts: _Facts, threads: int) -> None:
        self._source, self._facts = source, facts
        self._converter = RgbConverter()
        self._next = 0
        try:
            self._reader = _open(source, threads)
            count = len(self._reader)
            claimed = self._reader.get_frame_timestamp(list(range(count)))[:, 0]
        except (decord.DECORDError, RuntimeError, AssertionError, IndexError) as err:
            raise _refusal(source, f"open this file ({_short(err)})") from err
        times = np.array(facts.times_s)
        if count != len(times) or _disagreement_s(claimed, times) > _LARGEST_DISAGREEMENT_S:
            raise _refusal(source, "tell when the frames of this file are shown")

    def get(self, index: int) -> Frame:
        """Return frame `index` as it is shown; raise VideoError if it cannot be decoded."""
        try:
            self._advance(index)
            picture: Frame = self._reader.next().asnumpy()
        except (decord.DECORDError, RuntimeError, StopIteration) as err:
            raise VideoError(f"decord fails ({_short(err)})") from err
        self._next = index + 1
        height, width = picture.shape[:2]
        if (width, height, 3) != (*self._facts.decoded_size, picture.shape[2]):
            raise VideoError(
                "decord cannot give pictures of this size right: use --video-backend pyav"
            )
        if self._facts.recolour:
            picture = _recoloured(picture)
        shown_size = self._facts.info.width, self._facts.info.height
        if (width, height) != shown_size:
            picture = self._converter.resize(picture, *shown_size)
        return picture

    def _advance(self, index: int) -> None:
        """Let the next frame that the reader gives be `index`."""
        keys, times = self._facts.keys, self._facts.times_s
        place = bisect_right(keys, index) - 1
        if place >= 0 and times[keys[place]] - times[self._next] > _WORTH_SEEKING_S:
            self._reader.seek_accurate(index)
        elif keys and index > self._next:
            self._reader.skip_frames(index - self._next)
        else:  # in open groups of pictures skip_frames loses count
            for _ in range(index - self._next):
                self._reader.next()


def _open(source: VideoSource, threads: int) -> Any:
    options = {"ctx": decord.cpu(0), "num_threads": threads, "fault_tol": _ANY_FAULT}
    if source.is_plain_file:
        return decord.VideoReader(source.url, **options)
    with open_source(source) as file:  # read into memory as a whole
        return decord.VideoReader(file, **options)


def _disagreement_s(claimed: Any, times: Any) -> float:
    difference = claimed.astype(np.float64) - claimed[0] - times + times[0]
    return float(np.abs(difference).max()) if np.isfinite(difference).all() else float("inf")


def _recoloured(picture: Frame) -> Frame:
    flat = picture.reshape(-1, 3)
    out = np.empty_like(flat)
    for start in range(0, len(flat), _BAND_PIXELS):  # in pieces that stay in the cache
        band = slice(start, start + _BAND_PIXELS)
        planes = _601_TO_709 @ flat[band].T.astype(np.float32) + np.float32(0.5)
        out[band] = np.clip(planes, 0, 255).astype(np.uint8).T
    return out.reshape(picture.shape)


def _short(err: BaseException) -> str:
    """decord's messages begin with the time and the place in its source, and may hold a trace."""
    first = str(err).partition("\n")[0].strip() or type(err).__name__
    return re.sub(r"^((\[.*?\]|\S+\.cc:\d+:)\s*)+", "", first).rstrip(".")[:120]
