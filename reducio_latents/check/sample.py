"""Clips of a corpus to try autoencoders on: the same pixels for each, read once."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from reducio_latents.check.options import SampleSpec
from reducio_latents.check.pictures import Frames
from reducio_latents.core.text import printable
from reducio_latents.corpus import CorpusVideo, list_corpus
from reducio_latents.errors import CorpusError
from reducio_latents.video import get_backend
from reducio_latents.video.reading import Clip, ClipRead, ClipReader, ClipRequest


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
        self._places: list[int] = []
        """Where in the file each clip lies; they come in any order."""
        self._written = 0
        self._folder = tempfile.TemporaryDirectory(prefix="reducio-latents-")
        self._path = Path(self._folder.name) / "clips.u8"

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, number: int) -> Frames:
        """Return one clip, uint8 (T, H, W, 3)."""
        frames: Frames = np.array(self._map()[self._places[number]])
        return frames

    def batches(self, size: int) -> Iterator[Frames]:
        """Yield clips in order, up to `size` at a time, uint8 (B, T, H, W, 3)."""
        pixels = self._map()
        for start in range(0, len(self), size):
            yield np.array(pixels[self._places[start : start + size]])

    def put(self, frames: Frames) -> int:
        """Write a clip; return its place. It is one of the sample once it is added."""
        with self._path.open("ab") as file:
            file.write(np.ascontiguousarray(frames).tobytes())
        self._written += 1
        return self._written - 1

    def add(self, clip: SampledClip, place: int) -> None:
        self.clips.append(clip)
        self._places.append(place)

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
        shape = (self._written, bucket.frames, bucket.height, bucket.width, 3)
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
    get_backend("pyav")  # one that is not installed is told before anything is read
    listed = list_corpus(corpus)
    order: Sequence[CorpusVideo] = listed
    if spec.videos is not None:
        order = random.Random(spec.clip.seed).sample(listed, len(listed))
    wanted = len(listed) if spec.videos is None else min(spec.videos, len(listed))
    sample = Sample(name or Path(str(corpus)).stem or str(corpus), spec)
    waiting = iter(order)

    def request(video: CorpusVideo) -> ClipRequest:
        return ClipRequest(
            video=video.video,
            source=video.source,
            bucket=spec.bucket,
            clip=spec.clip,
            problem=video.problem,
        )

    def instead(failed: ClipRequest, why: str) -> ClipRequest | None:
        sample.failed[failed.video] = why.rstrip(".")
        following = next(waiting, None)
        return None if following is None else request(following)

    try:
        with ClipReader(
            [spec.bucket], workers=spec.workers, timeout_s=spec.timeout_s, substitute=instead
        ) as reader:
            _take(
                sample, reader.read(map(request, islice(waiting, wanted))), order, wanted, progress
            )
        if not len(sample):
            video, why = next(iter(sample.failed.items()))
            others = f" ({len(sample.failed)} videos tried)" if len(sample.failed) > 1 else ""
            raise CorpusError(
                f"{corpus} gives no clip to evaluate{others}: {about_video(video, why)}."
            )
    except BaseException:
        sample.close()
        raise
    return sample


def _take(
    sample: Sample,
    clips: Iterator[Clip | None],
    order: Sequence[CorpusVideo],
    wanted: int,
    progress: Callable[[int, int], None],
) -> None:
    """Write clips as they come; those of videos that gave all they were asked for are the sample's,
    by the order of the videos."""
    found: dict[str, list[tuple[SampledClip, int]]] = {}
    done = 0
    for clip in clips:
        if isinstance(clip, ClipRead):
            video = clip.request.video
            place = sample.put(clip.frames.numpy())
            found.setdefault(video, []).append((SampledClip(video, clip.start_s), place))
            done += clip.last
            progress(done, wanted)
    for entry in order:
        if entry.video not in sample.failed:
            for sampled, place in found.get(entry.video, ()):
                sample.add(sampled, place)


def about_video(video: str, why: str) -> str:
    """Return why a video gave no clip, with its name once: some reasons begin with its path."""
    reason = why.rstrip(".")
    return printable(reason if video in reason.partition(": ")[0] else f"{video}: {reason}")
