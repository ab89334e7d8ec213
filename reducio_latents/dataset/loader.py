"""`LatentLoader`: reads ahead by threads of this process, and counts what training was given."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import torch
from torch.utils.data import DataLoader, get_worker_info

from reducio_latents.dataset.batches import LatentBatch, LostBatchError
from reducio_latents.dataset.dataset import LatentDataset, Pass
from reducio_latents.dataset.wrapping import tells_own_count
from reducio_latents.errors import ConfigError


class LatentLoader(DataLoader[LatentBatch]):
    """Iterate over a dataset's batches while threads read those that come next.

    Reading is copying memory and decoding images, which hold no lock of Python's, so threads do it
    beside the training step, and nothing has to cross from one process to another. One iteration is
    one epoch. `state_dict()` counts the batches that were given out, not those read ahead; it is
    the dataset's own, so either may save it and either may load it.

    It is a DataLoader, as trainers ask for one, whose workers are threads. Batches are those of
    this rank: Accelerate's `prepare` leaves it as it is, and saves and loads its state with others.
    """

    dataset: LatentDataset
    _is_accelerate_prepared = True
    use_stateful_dataloader = True

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
        which is without waiting only if the dataset has `pin_memory=True`. Moments are moved as
        they are and drawn there, from the same noise as on the CPU: latents differ by rounding.
        """
        if threads < 1 or prefetch < 1:
            raise ConfigError(f"threads and prefetch must be >= 1, got {threads} and {prefetch}.")
        super().__init__(dataset, batch_size=None)
        self.sampler.set_epoch = self._follow  # type: ignore[attr-defined]
        self.threads = threads
        self.prefetch = prefetch
        self.device = None if device is None else _usable(device)

    def __len__(self) -> int:
        """Return the number of batches in the epoch that is on."""
        return len(self.dataset)

    def __iter__(self) -> Iterator[LatentBatch]:  # type: ignore[override]
        if get_worker_info() is not None:
            raise ConfigError("LatentLoader reads by threads: do not use it in a worker process.")
        self.dataset.begin()
        return self._batches()

    def _batches(self) -> Iterator[LatentBatch]:
        epoch = self.dataset.begin()  # once more: trainers set the epoch of what they have begun
        yield from epoch.give_out(self._read_ahead(epoch), self.device)

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be this epoch; not needed, as each one is followed by the next."""
        self.dataset.set_epoch(epoch)

    def _follow(self, epoch: int) -> None:
        """Go on to an epoch that a trainer tells its samplers.

        Lightning has nothing else to say where it goes on after a whole epoch.
        """
        if epoch > self.dataset.cursor.epoch and not tells_own_count():
            self.dataset.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return where training stands; see `LatentDataset.state_dict`."""
        return self.dataset.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration begin with the batch after those that were given out."""
        self.dataset.load_state_dict(state)

    def _read_ahead(self, epoch: Pass) -> Iterator[tuple[int, LatentBatch | LostBatchError]]:
        with ThreadPoolExecutor(self.threads, thread_name_prefix="latents") as pool:
            draw = self.device is None or self.device.type == "cpu"
            submitted = ((n, pool.submit(epoch.read, n, draw=draw)) for n in epoch.numbers)
            waiting = deque(islice(submitted, self.prefetch))
            try:
                while waiting:
                    number, future = waiting.popleft()
                    batch = future.result()
                    waiting.extend(islice(submitted, 1))
                    yield number, batch
            finally:
                for _, future in waiting:
                    future.cancel()


def _usable(device: torch.device | str) -> torch.device:
    try:
        found = torch.device(device)
    except RuntimeError as err:
        raise ConfigError(f"device is {device!r}, which PyTorch does not know.") from err
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device is {device!r}, but PyTorch finds no GPU here. Leave it out.")
    return found
