"""Batches decoded ahead by worker processes, in an order that is given."""

from __future__ import annotations

import hashlib
import logging
import random
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch

from reducio_latents.errors import TrainingError
from reducio_latents.train.batch import PixelBatch, TrainOrder
from reducio_latents.train.config import DataConfig
from reducio_latents.train.split import ClipTable
from reducio_latents.video.pixels import Augmentation
from reducio_latents.video.reading import Clip, ClipRead, ClipReader, ClipRequest

log = logging.getLogger(__name__)

UNLIMITED = 1 << 62


@dataclass(frozen=True)
class BatchRequest:
    """A batch to be decoded: clips of one bucket."""

    clips: tuple[int, ...]
    seeds: tuple[int, ...] = ()
    """Where each clip's random numbers come from; none in validation."""

    @property
    def training(self) -> bool:
        return bool(self.seeds)


def training_requests(
    order: TrainOrder, numbers: Iterable[int], seed: int
) -> Iterator[BatchRequest]:
    """Yield the batches of these numbers, as `order` has them."""
    for number in numbers:
        epoch, _ = order.position(number)
        clips = order.clips(number)
        yield BatchRequest(tuple(clips), tuple(clip_seed(seed, epoch, clip) for clip in clips))


def clip_seed(seed: int, epoch: int, clip: int) -> int:
    """Return what a clip's crop, mirror and noise come from; another number in each epoch."""
    digest = hashlib.sha256(f"{seed}/{epoch}/{clip}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def augmentation(data: DataConfig, seed: int) -> Augmentation:
    """Return a clip's crop and mirror, drawn from its seed."""
    rng = random.Random(seed)
    low, high = data.crop_area
    return Augmentation(
        area=low + (high - low) * rng.random(),
        x=rng.random(),
        y=rng.random(),
        crop=data.crop == "random_resized",
        mirror=rng.random() < 0.5 and data.flip,
    )


class BatchStream:
    """Iterate over requested batches, in order, decoded ahead.

    A clip that cannot be read is kept in `failed` and logged. In training the clip that follows it
    in the table takes its place, so that batches stay full; in validation nothing does.
    """

    def __init__(
        self, table: ClipTable, data: DataConfig, requests: Iterable[BatchRequest]
    ) -> None:
        self.failed: dict[int, str] = {}
        """Clip -> why it could not be read."""
        self._table, self._data = table, data
        self._requests = requests
        self._begun: deque[BatchRequest] = deque()

    def __iter__(self) -> Generator[PixelBatch]:
        data = self._data
        with ClipReader(
            self._table.sizes,
            workers=data.workers,
            timeout_s=data.timeout_s,
            read_ahead_bytes=UNLIMITED,  # `_clips` counts batches
            substitute=self._instead,
        ) as reader:
            found: list[Clip] = []
            for clip in reader.read(self._clips()):
                if clip is None:
                    continue
                found.append(clip)
                if len(found) == len(self._begun[0].clips):
                    batch = self._batch(self._begun.popleft(), found)
                    found = []
                    if batch is not None:
                        yield batch

    def _clips(self) -> Iterator[ClipRequest | None]:
        for request in self._requests:
            while len(self._begun) >= self._data.ahead:
                yield None
            self._begun.append(request)
            seeds = request.seeds or (None,) * len(request.clips)
            for clip, seed in zip(request.clips, seeds, strict=True):
                yield self._clip(self._readable(clip) if request.training else clip, seed)

    def _clip(self, clip: int, seed: int | None) -> ClipRequest:
        table, data = self._table, self._data
        how = Augmentation() if seed is None else augmentation(data, seed)
        return ClipRequest(
            tag=(clip, seed),
            video=table.name(clip).video,
            source=table.source(clip),
            bucket=table.bucket(clip),
            clip=data.clip,
            starts_s=(table.name(clip).start_s,),
            resize=data.resize,
            backend=data.video_backend,
            deinterlace=data.deinterlace != "none",
            fit=how.fit,
        )

    def _readable(self, clip: int) -> int:
        """Return the clip, or the first after it that is not known to fail."""
        found = clip
        while found in self.failed:
            found = self._table.following(found)
            if found == clip:
                raise TrainingError(f"no clip of {self._table.bucket(clip)} could be read.")
        return found

    def _instead(self, request: ClipRequest, why: str) -> ClipRequest | None:
        """Take note of a clip that failed; return what is read in its place, if anything is."""
        clip, seed = request.tag
        name = self._table.name(clip)
        # Backends say of which file and clip they speak, which the name does already.
        source = request.source
        known = (
            f"{source}: ",
            f"{source.url}: ",
            f"{name.video}: ",
            f"clip at {name.start_s:.3f} s: ",
        )
        for words in known:
            why = why.removeprefix(words)
        why = why.rstrip(".")
        self.failed[clip] = why
        log.warning("skipped %s: %s", name, why)
        if len(self.failed) > self._data.max_failed * len(self._table):
            raise TrainingError(
                f"{len(self.failed)} of {len(self._table)} clips could not be read, more than "
                f"data.max_failed={self._data.max_failed}. The last one, {name}: {why}. A larger "
                "data.max_failed does without them."
            )
        return None if seed is None else self._clip(self._readable(clip), seed)

    def _batch(self, request: BatchRequest, found: Sequence[Clip]) -> PixelBatch | None:
        """Return the batch of the places that hold a clip; None if there are none."""
        kept = [(i, clip) for i, clip in enumerate(found) if isinstance(clip, ClipRead)]
        if not kept:
            return None
        return PixelBatch(
            torch.stack([clip.frames for _, clip in kept]),
            tuple(request.seeds[i] for i, _ in kept) if request.seeds else (),
            tuple(self._table.name(clip.request.tag[0]) for _, clip in kept),
        )
