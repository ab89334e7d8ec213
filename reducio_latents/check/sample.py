"""Clips of a corpus to try autoencoders on: the same pixels for each, read once."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from reducio_latents.check.benchmarks import PresetName, require_layout
from reducio_latents.check.options import SampleSpec
from reducio_latents.check.pictures import Frames
from reducio_latents.core.text import printable
from reducio_latents.corpus import list_corpus
from reducio_latents.errors import CorpusError
from reducio_latents.video import get_backend
from reducio_latents.video.reading import ClipRead, ClipReader, ClipRequest


class SampledClip(NamedTuple):
    """One clip of the sample."""

    video: str
    start_s: float


class Sample(AbstractContextManager["Sample", None]):
    """Clips of a corpus on a temporary file, uint8 (N, T, H, W, 3). Use `with`."""

    def __init__(self, name: str, spec: SampleSpec) -> None:
        self.name = name
        self.spec = spec
        self.clips: list[SampledClip] = []
        self.failed: dict[str, str] = {}
        """Videos that gave no clip, and why."""
        self._places: dict[SampledClip, int] = {}
        """Where in the file each clip is."""
        self._folder = tempfile.TemporaryDirectory(prefix="reducio-latents-")
        self._path = Path(self._folder.name) / "clips.u8"

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, number: int) -> Frames:
        """Return one clip, uint8 (T, H, W, 3)."""
        frames: Frames = np.array(self._map()[self._places[self.clips[number]]])
        return frames

    def batches(self, size: int) -> Iterator[Frames]:
        """Yield clips in order, up to `size` at a time, uint8 (B, T, H, W, 3)."""
        pixels, places = self._map(), [self._places[clip] for clip in self.clips]
        for start in range(0, len(self), size):
            yield np.array(pixels[places[start : start + size]])

    def add(self, clip: SampledClip, frames: Frames) -> None:
        with self._path.open("ab") as file:
            file.write(np.ascontiguousarray(frames).tobytes())
        self._places[clip] = len(self._places)
        self.clips.append(clip)

    def settle(self, order: Sequence[str]) -> None:
        """Order the clips by their videos, and leave out those of videos that failed later."""
        numbers = {video: number for number, video in enumerate(order)}
        whole = [clip for clip in self.clips if clip.video not in self.failed]
        self.clips = sorted(whole, key=lambda clip: numbers[clip.video])

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def _map(self) -> NDArray[np.uint8]:
        bucket = self.spec.bucket
        shape = (len(self._places), bucket.frames, bucket.height, bucket.width, 3)
        return np.memmap(self._path, np.uint8, "r", shape=shape)


def read_sample(
    corpus: str | Path,
    spec: SampleSpec,
    *,
    name: str | None = None,
    preset: PresetName | None = None,
    progress: Callable[[int, int], None] = lambda _, __: None,
) -> Sample:
    """Read the clips that `spec` names into a temporary file.

    A video that fails is recorded and another one takes its place, as long as there are any.
    `progress` is told (videos read, videos wanted). Raises CorpusError if there is no clip at all.
    """
    get_backend("pyav")  # one that is not installed is told before anything is read
    order = list_corpus(corpus)
    require_layout(preset, corpus, [video.video for video in order])
    wanted = len(order) if spec.videos is None else min(spec.videos, len(order))
    if spec.videos is not None:
        order = random.Random(spec.clip.seed).sample(order, len(order))
    sample = Sample(name or Path(str(corpus)).stem or str(corpus), spec)
    requests = (
        ClipRequest(
            video=video.video,
            source=video.source,
            bucket=spec.bucket,
            clip=spec.clip,
            problem=video.problem,
        )
        for video in order
    )

    def instead(failed: ClipRequest, why: str) -> ClipRequest | None:
        sample.failed[failed.video] = why.rstrip(".")
        return next(requests, None)

    done = 0
    try:
        with ClipReader(
            [spec.bucket], workers=spec.workers, timeout_s=spec.timeout_s, substitute=instead
        ) as reader:
            for clip in reader.read(islice(requests, wanted)):
                if isinstance(clip, ClipRead):
                    sample.add(SampledClip(clip.request.video, clip.start_s), clip.frames.numpy())
                    done += clip.last
                    progress(done, wanted)
        sample.settle([video.video for video in order])
        if not len(sample):
            first = about_video(*next(iter(sample.failed.items())))
            others = f" ({len(sample.failed)} videos tried)" if len(sample.failed) > 1 else ""
            raise CorpusError(f"{corpus} gives no clip to evaluate{others}: {first}.")
    except BaseException:
        sample._folder.cleanup()
        raise
    return sample


def about_video(video: str, why: str) -> str:
    """Return why a video gave no clip, with its name once: some reasons begin with its path."""
    reason = why.rstrip(".")
    return printable(reason if video in reason.partition(": ")[0] else f"{video}: {reason}")
