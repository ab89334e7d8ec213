"""Batches decoded ahead by worker processes, in an order that is given."""

from __future__ import annotations

import hashlib
import logging
import queue
import random
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from reducio_latents.core.geometry import Bucket
from reducio_latents.errors import TrainingError
from reducio_latents.train.batch import Batch
from reducio_latents.train.config import DataConfig
from reducio_latents.train.decoding import PRELOAD, Augmentation, ClipTask, decode_clip
from reducio_latents.train.order import BatchOrder
from reducio_latents.train.split import ClipTable
from reducio_latents.video.processes import Event, ProcessPool

log = logging.getLogger(__name__)

IDLE_S = 0.01
"""How often a full stream looks whether a batch was taken."""


@dataclass(frozen=True)
class Request:
    """A batch to be decoded: clips of one bucket."""

    clips: tuple[int, ...]
    seeds: tuple[int, ...] = ()
    """Where each clip's random numbers come from; none in validation."""

    @property
    def training(self) -> bool:
        return bool(self.seeds)


def training_requests(order: BatchOrder, numbers: Iterable[int], seed: int) -> Iterator[Request]:
    """Yield the batches of these numbers, as `order` has them."""
    for number in numbers:
        epoch, _ = order.position(number)
        clips = order.clips(number)
        yield Request(tuple(clips), tuple(clip_seed(seed, epoch, clip) for clip in clips))


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


@dataclass
class _Pending:
    """A batch of which some clips are not decoded yet."""

    request: Request
    clips: list[int | None]
    """What each place holds; None: nothing, as its clip could not be read."""
    frames: Tensor
    missing: int

    def finish(self, table: ClipTable) -> Batch | None:
        """Return the batch of the places that hold a clip; None if there are none."""
        kept = [i for i, clip in enumerate(self.clips) if clip is not None]
        if not kept:
            return None
        frames = self.frames if len(kept) == len(self.clips) else self.frames[kept]
        seeds = tuple(self.request.seeds[i] for i in kept) if self.request.seeds else ()
        names = tuple(table.name(clip) for clip in self.clips if clip is not None)
        return Batch(frames, seeds, names)


class BatchStream:
    """Iterate over requested batches, in order, decoded ahead.

    A clip that cannot be read is kept in `failed` and logged. In training the clip that follows it
    in the table takes its place, so that batches stay full; in validation nothing does.
    """

    def __init__(self, table: ClipTable, data: DataConfig, requests: Iterable[Request]) -> None:
        self.failed: dict[int, str] = {}
        """Clip -> why it could not be read."""
        self._table, self._data = table, data
        self._requests = iter(requests)
        self._order: deque[_Pending] = deque()
        self._running: dict[int, tuple[_Pending, int]] = {}
        self._submitted = 0

    def __iter__(self) -> Generator[Batch]:
        # A thread moves clips from the workers' memory into batches while the caller trains.
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue()
        stop = threading.Event()
        thread = threading.Thread(target=self._collect, args=(ready, stop), daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()

    def _collect(
        self, ready: queue.Queue[Batch | BaseException | None], stop: threading.Event
    ) -> None:
        try:
            with self._pool() as pool:
                while not stop.is_set() and (self._feed(pool, ready.qsize()) or self._order):
                    while self._order and not self._order[0].missing:
                        batch = self._order.popleft().finish(self._table)
                        if batch is not None:
                            ready.put(batch)
                    if not self._running:
                        stop.wait(IDLE_S)
                    for event in pool.poll(0.2):
                        self._take(pool, event)
            ready.put(None)
        except BaseException as err:
            ready.put(err)

    def _pool(self) -> ProcessPool:
        return ProcessPool(
            target=decode_clip,
            workers=self._data.workers,
            timeout_s=self._data.timeout_s,
            slots=2,
            slot_bytes=max(map(_clip_bytes, self._table.sizes)),
            preload=PRELOAD,
        )

    def _feed(self, pool: ProcessPool, waiting: int) -> bool:
        """Ask for batches until enough are under way or waiting; return whether any are left."""
        while len(self._order) + waiting < self._data.ahead:
            request = next(self._requests, None)
            if request is None:
                return False
            size = self._table.bucket(request.clips[0])
            shape = (len(request.clips), size.frames, size.height, size.width, 3)
            frames = torch.zeros(shape, dtype=torch.uint8)
            pending = _Pending(request, list(request.clips), frames, len(request.clips))
            self._order.append(pending)
            for place, clip in enumerate(request.clips):
                self._submit(pool, pending, place, clip)
        return True

    def _submit(self, pool: ProcessPool, pending: _Pending, place: int, clip: int) -> None:
        """Have a clip decoded into its place, or what takes its place if it is known to fail."""
        request, table, data = pending.request, self._table, self._data
        if request.training:
            clip = self._readable(clip)
        pending.clips[place] = clip
        task = ClipTask(
            source=table.source(clip),
            start_s=table.name(clip).start_s,
            bucket=table.bucket(clip),
            rate_fps=data.clip.rate_fps,
            resize=data.resize,
            backend=data.video_backend,
            augmentation=(
                augmentation(data, request.seeds[place]) if request.training else Augmentation()
            ),
        )
        self._running[self._submitted] = pending, place
        pool.submit(self._submitted, task)
        self._submitted += 1

    def _readable(self, clip: int) -> int:
        """Return the clip, or the first after it that is not known to fail."""
        found = clip
        while found in self.failed:
            found = self._table.following(found)
            if found == clip:
                raise TrainingError(f"no clip of {self._table.bucket(clip)} could be read.")
        return found

    def _take(self, pool: ProcessPool, event: Event) -> None:
        if event.kind == "item" and event.slot is not None:
            pending, place = self._running[event.task]
            target = pending.frames[place]
            pixels = torch.frombuffer(event.slot.memory, dtype=torch.uint8, count=target.numel())
            target.copy_(pixels.view(target.shape))
            del pixels  # it exports the slot's memory, which `release` gives back
            pool.release(event.slot)
            pending.missing -= 1
        elif event.kind == "item":
            self._fail(pool, event.task, event.value)
        elif event.kind == "lost":
            self._fail(pool, event.task, str(event.value))
        if event.kind != "item":
            del self._running[event.task]

    def _fail(self, pool: ProcessPool, task: int, why: str) -> None:
        pending, place = self._running[task]
        clip = pending.clips[place]
        assert clip is not None
        name = self._table.name(clip)
        # Backends say of which file and clip they speak, which the name does already.
        source = self._table.source(clip)
        for known in (f"{source}: ", f"{source.url}: ", f"clip at {name.start_s:.3f} s: "):
            why = why.removeprefix(known)
        why = why.rstrip(".")
        self.failed[clip] = why
        log.warning("skipped %s: %s", name, why)
        if len(self.failed) > self._data.max_failed * len(self._table):
            raise TrainingError(
                f"{len(self.failed)} of {len(self._table)} clips could not be read, more than "
                f"data.max_failed={self._data.max_failed}. The last one, {name}: {why}. A larger "
                "data.max_failed does without them."
            )
        if pending.request.training:
            self._submit(pool, pending, place, clip)
        else:
            pending.clips[place] = None
            pending.missing -= 1


def _clip_bytes(bucket: Bucket) -> int:
    return bucket.frames * bucket.height * bucket.width * 3
