"""Clips of a corpus to try autoencoders on: the same pixels for each, read once."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from reducio_latents.check.pictures import Frames
from reducio_latents.clips import clip_starts
from reducio_latents.config import ClipSpec
from reducio_latents.corpus import CorpusVideo, list_corpus
from reducio_latents.errors import ConfigError, CorpusError, VideoError
from reducio_latents.geometry import Bucket
from reducio_latents.pixels import fit_frame
from reducio_latents.video import VideoBackend, get_backend


@dataclass(frozen=True, kw_only=True)
class SampleSpec:
    """Which clips of a corpus, and how they are fitted."""

    clip: ClipSpec = field(default_factory=lambda: ClipSpec(policy="centre"))
    resolution: int = 256
    """Side of the square that frames are resized to cover and cropped to, in px."""
    videos: int | None = None
    """How many videos, drawn by `clip.seed`; None: all."""
    resize: str = "bicubic"
    video_backend: str = "pyav"

    def __post_init__(self) -> None:
        if self.videos is not None and self.videos < 1:
            raise ConfigError(f"the number of videos is {self.videos}; ask for at least 1.")
        if self.resolution < 1:
            raise ConfigError(f"the resolution is {self.resolution}; give a side in px.")

    @property
    def bucket(self) -> Bucket:
        return Bucket(self.clip.frames, self.resolution, self.resolution)


PRESETS: dict[str, int | None] = {"pexels-1k": 1000, "ucf-101": None}
"""How many videos the paper measures on, None for all; the defaults of `SampleSpec` are its other
settings. It does not say which videos: here a seed draws them, and the clip is the middle one."""


class SampledClip(NamedTuple):
    """One clip of the sample."""

    video: str
    start_s: float


class Sample:
    """Clips of a corpus on a temporary file, uint8 (N, T, H, W, 3). Close it, or use `with`."""

    def __init__(self, name: str, spec: SampleSpec) -> None:
        self.name = name
        self.spec = spec
        self.clips: list[SampledClip] = []
        self.failed: dict[str, str] = {}
        """Videos that gave no clip, and why."""
        self._folder = tempfile.TemporaryDirectory(prefix="reducio-latents-")
        self._path = Path(self._folder.name) / "clips.u8"

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, number: int) -> Frames:
        """Return one clip, uint8 (T, H, W, 3)."""
        frames: Frames = np.array(self._map()[number])
        return frames

    def batches(self, size: int) -> Iterator[Frames]:
        """Yield clips in order, up to `size` at a time, uint8 (B, T, H, W, 3)."""
        pixels = self._map()
        for start in range(0, len(self), size):
            yield np.array(pixels[start : start + size])

    def add(self, clip: SampledClip, frames: Frames) -> None:
        with self._path.open("ab") as file:
            file.write(np.ascontiguousarray(frames).tobytes())
        self.clips.append(clip)

    def close(self) -> None:
        self._folder.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        err: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _map(self) -> NDArray[np.uint8]:
        bucket = self.spec.bucket
        shape = (len(self), bucket.frames, bucket.height, bucket.width, 3)
        return np.memmap(self._path, np.uint8, "r", shape=shape)


def read_sample(
    corpus: str | Path,
    spec: SampleSpec,
    *,
    name: str | None = None,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> Sample:
    """Read the clips that `spec` names into a temporary file.

    A video that fails is recorded and another one takes its place, as long as there are any.
    `progress` is told (videos read, videos wanted). Raises CorpusError if there is no clip at all.
    """
    listed = list_corpus(corpus)
    order: Sequence[CorpusVideo] = listed
    if spec.videos is not None:
        order = random.Random(spec.clip.seed).sample(listed, len(listed))
    wanted = len(listed) if spec.videos is None else min(spec.videos, len(listed))
    sample = Sample(name or Path(str(corpus)).stem or str(corpus), spec)
    backend, done = get_backend(spec.video_backend), 0
    for video in order:
        if done == wanted:
            break
        try:
            _read_video(sample, video, backend)
        except VideoError as err:
            sample.failed[video.video] = str(err)
        else:
            done += 1
            progress(done, wanted)
    if not len(sample):
        sample.close()
        first = next(iter(sample.failed.items()), ("", "every one is too short"))
        raise CorpusError(f"{corpus} gives no clip to evaluate: {first[0]}: {first[1]}.")
    return sample


def _read_video(sample: Sample, video: CorpusVideo, backend: VideoBackend) -> None:
    spec = sample.spec
    if video.problem is not None:
        raise VideoError(video.problem)
    starts = clip_starts(backend.probe(video.source).duration_s, spec.clip, video.video)
    if not starts:
        raise VideoError(f"it is shorter than a clip of {spec.clip.span_s:g} s")
    clips = backend.read_clips(
        video.source,
        starts,
        frames=spec.clip.frames,
        rate_fps=spec.clip.rate_fps,
        transform=partial(fit_frame, bucket=spec.bucket, mode=spec.resize),
    )
    found = list(clips)
    for clip in found:
        if isinstance(clip, VideoError):
            raise clip
    for clip in found:
        if not isinstance(clip, VideoError):
            sample.add(SampledClip(video.video, clip.start_s), np.stack(list(clip.frames)))
