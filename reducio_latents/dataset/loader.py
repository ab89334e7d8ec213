"""`LatentLoader`: reads ahead by threads of this process, and counts what training was given."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from reducio_latents.dataset.batches import Batch
from reducio_latents.dataset.cursor import Span
from reducio_latents.dataset.dataset import LatentDataset
from reducio_latents.errors import ConfigError


class LatentLoader:
    """Iterate over a dataset's batches while threads read those that come next.

    Reading is copying memory and decoding images, which hold no lock of Python's, so threads do it
    beside the training step, and nothing has to cross from one process to another. One iteration is
    one epoch. `state_dict()` counts the batches that were given out, not those read ahead; it is
    the dataset's own, so either may save it and either may load it.
    """

    def __init__(
        self,
        dataset: LatentDataset,
        *,
        threads: int = 2,
        prefetch: int = 4,
        device: torch.device | str | None = None,
    ) -> None:
        """Keep up to `prefetch` batches read ahead.

        Two threads are for batches that cost computing: latents that are drawn, images that are
        decoded. Where rows are only copied (`latents="moments"`), one is as fast and cheaper.

        With a `device`, tensors are moved there: on a GPU the copies run beside the computation,
        which is without waiting only if the dataset has `pin_memory=True`.
        """
        if threads < 1 or prefetch < 1:
            raise ConfigError(f"threads and prefetch must be >= 1, got {threads} and {prefetch}.")
        self.dataset = dataset
        self.threads = threads
        self.prefetch = prefetch
        self.device = None if device is None else _usable(device)

    def __len__(self) -> int:
        """Return the number of batches in the epoch that is on."""
        return len(self.dataset)

    def __iter__(self) -> Iterator[Batch]:
        span = self.dataset.cursor.begin()
        if span is None or span.step != 1:
            raise ConfigError("LatentLoader reads by threads: do not use it in a worker process.")
        batches = self._read_ahead(span)
        if self.device is not None:
            batches = move_ahead(batches, self.device)
        return self._counted(batches, span)

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be this epoch; not needed, as each one is followed by the next."""
        self.dataset.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return where training stands; see `LatentDataset.state_dict`."""
        return self.dataset.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration begin with the batch after those that were given out."""
        self.dataset.load_state_dict(state)

    def _read_ahead(self, span: Span) -> Iterator[Batch]:
        numbers = range(span.first, self.dataset.num_batches(span.epoch))
        with ThreadPoolExecutor(self.threads, thread_name_prefix="latents") as pool:
            submitted = (pool.submit(self.dataset.batch, span.epoch, n) for n in numbers)
            waiting = deque(islice(submitted, self.prefetch))
            try:
                while waiting:
                    batch = waiting.popleft().result()
                    waiting.extend(islice(submitted, 1))
                    yield batch
            finally:
                for future in waiting:
                    future.cancel()

    def _counted(self, batches: Iterator[Batch], span: Span) -> Iterator[Batch]:
        for number, batch in enumerate(batches, span.first):
            self.dataset.cursor.gave(span, number)
            yield batch
        self.dataset.cursor.finish(span)


def _usable(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as err:
        raise ConfigError(f"device is {device!r}, which PyTorch does not know.") from err
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {device!r}, but PyTorch finds no GPU here. Leave it out.")
    return found


def move_ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """Yield batches with their tensors on `device`, each being copied while the one before is used.

    On CUDA the copies run on a stream of their own; the stream that uses a batch waits for its
    copy, and for nothing else.
    """
    if device.type != "cuda":
        yield from (_moved(batch, device) for batch in batches)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    ahead: tuple[Batch, torch.cuda.Event] | None = None
    for batch in batches:
        with torch.cuda.stream(stream):
            moved = (_moved(batch, device), stream.record_event())
        if ahead is not None:
            yield _handed_over(*ahead, device)
        ahead = moved
    if ahead is not None:
        yield _handed_over(*ahead, device)


def _moved(batch: Batch, device: torch.device) -> Batch:
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }


def _handed_over(batch: Batch, copied: torch.cuda.Event, device: torch.device) -> Batch:
    """Let the current stream use a batch that another stream has copied."""
    current = torch.cuda.current_stream(device)
    current.wait_event(copied)
    for value in batch.values():
        if isinstance(value, Tensor):
            value.record_stream(current)
    return batch
