"""Backends that give frames by index: which is shown when is taken from the file's packets.

Here is what two libraries have in common: what is refused, since they cannot read it exactly, and
colours and sizes as they are shown. Unlike PyAV they do not tell of damage that a decoder conceals.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

import numpy as np

from reducio_latents.errors import VideoError
from reducio_latents.files.source import VideoSource
from reducio_latents.video.assemble import ClipAssembly
from reducio_latents.video.colour import BT601, BT709, ColourTags, RgbConverter
from reducio_latents.video.file import Scan, VideoFile
from reducio_latents.video.protocol import ClipFrames, Frame, Transform, VideoInfo
from reducio_latents.video.pyav import info_of

LARGEST_DISAGREEMENT_S = 5e-4
"""Between times that a library tells, maybe as float32, and those of the packets."""
_BAND_PIXELS = 1 << 15
_YCC_TO_RGB = {
    BT601: np.array([[1, 0, 1.402], [1, -0.344136, -0.714136], [1, 1.772, 0]]),
    BT709: np.array([[1, 0, 1.5748], [1, -0.187324, -0.468124], [1, 1.8556, 0]]),
}
_601_TO_709 = (_YCC_TO_RGB[BT709] @ np.linalg.inv(_YCC_TO_RGB[BT601])).astype(np.float32)
"""RGB that was made by the matrix of BT.601 -> what that of BT.709 gives."""


@dataclass(frozen=True)
class Facts:
    """What the packets and the first frame of a video say."""

    info: VideoInfo
    times_s: list[float]
    """When each frame is shown, ascending."""
    rounding_s: float
    keys: list[int]
    """Key frames, ascending; none if a library must not seek in this file."""
    decoded_size: tuple[int, int]
    """(width, height) of what a library gives: turned, but not scaled."""
    recolour: bool
    """What is untagged is taken for BT.601; this is not."""


class IndexedBackend:
    """What libraries have in common that give frames by index."""

    name: str
    containers: tuple[str, ...]
    """In others its frame numbers or seeks are wrong, or it cannot tell times."""
    lacks: tuple[str, ...] = ()
    """Codecs that it cannot decode."""
    seeks: tuple[str, ...] | None = None
    """Codecs in which it seeks right, where every group of pictures is closed; None: in all."""

    def __init__(self, *, threads: int = 1, deinterlace: bool = True) -> None:
        self.threads = threads
        self._deinterlace = deinterlace

    def pictures(
        self, source: VideoSource, facts: Facts
    ) -> AbstractContextManager[Callable[[int], Frame]]:
        """Open a video for what gives frames by ascending index, uint8 RGB of `decoded_size`.

        Both raise VideoError: this where the library does not see the `facts` as they are.
        """
        raise NotImplementedError

    def probe(self, source: VideoSource, *, alive: Callable[[], None] = lambda: None) -> VideoInfo:
        """See `VideoBackend.probe`; the numbers are PyAV's. Refuses what cannot be read."""
        facts = self._facts(source, alive)
        with self.pictures(source, facts):
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
            facts = self._facts(source)
            with self.pictures(source, facts) as picture:
                yield from self._read(picture, facts, clips)
        except VideoError as err:
            yield from clips.fail_rest(str(err).removeprefix(f"{source}: ").rstrip("."))

    def _read(
        self, picture: Callable[[int], Frame], facts: Facts, clips: ClipAssembly
    ) -> Iterator[ClipFrames | VideoError]:
        times, converter = facts.times_s, RgbConverter()
        while (wanted_s := clips.next_s) is not None and wanted_s < facts.info.duration_s:
            index = bisect_right(times, wanted_s + facts.rounding_s) - 1
            is_last = index + 1 == len(times)
            before_s = facts.info.duration_s if is_last else times[index + 1] - facts.rounding_s
            shown = partial(self._shown, picture, index, facts, converter)
            yield from clips.show(shown, times[index], before_s)
        yield from clips.fail_rest(
            f"it runs past the end of the video, at {facts.info.duration_s:.3f} s"
        )

    def _shown(
        self,
        picture: Callable[[int], Frame],
        index: int,
        facts: Facts,
        converter: RgbConverter,
    ) -> Frame:
        """Return frame `index` as it is shown; raise VideoError if it cannot be had."""
        found = picture(index)
        height, width = found.shape[:2]
        if (width, height, 3) != (*facts.decoded_size, found.shape[2]):
            raise VideoError(
                f"{self.name} cannot give pictures of this size right: use --video-backend pyav"
            )
        if facts.recolour:
            found = _recoloured(found)
        shown_size = facts.info.width, facts.info.height
        return found if (width, height) == shown_size else converter.resize(found, *shown_size)

    def _facts(self, source: VideoSource, alive: Callable[[], None] = lambda: None) -> Facts:
        """Look at a video by PyAV; raise VideoError if the library is not to be trusted with it."""
        with VideoFile(source) as video:
            scan = video.scan(alive)
            try:
                orientation = video.orientation(scan.first)
                tags = ColourTags.of(scan.first)
            except VideoError as err:
                raise video.error(str(err)) from err
            why = self._why_refused(video, scan, tags)
            why = why or ("mirror pictures" * orientation.mirrored)
            if not why and self._deinterlace and video.may_be_interlaced(scan.first):
                why = "deinterlace, and this video may have interlaced frames"
            if why:
                raise self.refusal(source, why)
            times = sorted(scan.times_s)
            can_seek = self.seeks is None or video.codec in self.seeks
            return Facts(
                info=info_of(video, scan),
                times_s=times,
                rounding_s=video.rounding_s,
                keys=_closed_keys(scan, times) if can_seek else [],
                decoded_size=orientation.size(scan.first.width, scan.first.height),
                recolour=not tags.is_tagged and tags.matrix == BT709,
            )

    def _why_refused(self, video: VideoFile, scan: Scan, tags: ColourTags) -> str | None:
        """Complete the sentence `it cannot ...`, or return None."""
        layout = scan.first.format
        if video.codec in self.lacks:
            return f"decode {video.codec}"
        if video.format not in self.containers:
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

    def refusal(self, source: VideoSource, what: str) -> VideoError:
        return VideoError(f"{source}: {self.name} cannot {what}: use --video-backend pyav.")


def _closed_keys(scan: Scan, times: list[float]) -> list[int]:
    """Return the index of each key frame, or none at all if an earlier frame is stored after one:
    a library would start there, without what that frame refers to.
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


def _recoloured(picture: Frame) -> Frame:
    flat = picture.reshape(-1, 3)
    out = np.empty_like(flat)
    for start in range(0, len(flat), _BAND_PIXELS):  # in pieces that stay in the cache
        band = slice(start, start + _BAND_PIXELS)
        planes = _601_TO_709 @ flat[band].T.astype(np.float32) + np.float32(0.5)
        out[band] = np.clip(planes, 0, 255).astype(np.uint8).T
    return out.reshape(picture.shape)
