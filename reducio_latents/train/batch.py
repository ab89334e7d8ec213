"""What one rank sees in one forward pass, and which clips these are: arithmetic, not state.

A batch has `batch_size` clips of one bucket. Batch n of a run is a pure function of (clips, seed,
batch size, n); a step takes the next ranks * accumulate of them. So a position is (epoch, batch),
and any number of ranks can continue from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reducio_latents.errors import ConfigError


class ClipName(NamedTuple):
    """Which clip it is, for messages."""

    video: str
    start_s: float

    def __str__(self) -> str:
        return f"{self.video} at {self.start_s:.3f} s"


@dataclass(frozen=True)
class PixelBatch:
    """Clips of one size."""

    frames_BTHWC: Tensor
    """uint8 RGB."""
    seeds: tuple[int, ...]
    """One for each clip: where its random numbers come from."""
    clips: tuple[ClipName, ...]


def clip_noise(seeds: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
    """Return standard normal noise (B, *shape), each clip's from its own seed."""
    return torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )


class TrainOrder:
    """The batches of clips, epoch after epoch. `buckets` has the number of each clip's bucket."""

    def __init__(
        self, buckets: Sequence[int] | NDArray[np.int32], batch_size: int, seed: int
    ) -> None:
        numbers = np.asarray(buckets)
        self._clips = [np.flatnonzero(numbers == number) for number in np.unique(numbers)]
        self._batch_size = batch_size
        self._seed = seed
        self.batches_per_epoch = sum(len(clips) // batch_size for clips in self._clips)
        if not self.batches_per_epoch:
            raise ConfigError(
                f"the training split has {len(numbers)} clips in {len(self._clips)} buckets, and "
                f"no bucket fills a batch of {batch_size}. Give more videos, a smaller "
                "train.batch_size, or another data.clip.policy."
            )
        self._epoch: int | None = None
        self._batches: NDArray[np.int64] = np.empty((0, batch_size), np.int64)

    def position(self, number: int) -> tuple[int, int]:
        """Return (epoch, batch of that epoch) of the run's batch `number`."""
        return divmod(number, self.batches_per_epoch)

    def clips(self, number: int) -> list[int]:
        """Return the clips of the run's batch `number`, indices into `buckets`.

        Every clip comes once an epoch, but for what does not fill a batch of its bucket.
        """
        epoch, batch = self.position(number)
        if epoch != self._epoch:
            self._epoch, self._batches = epoch, self._shuffled(epoch)
        return self._batches[batch].tolist()  # type: ignore[no-any-return]

    def _shuffled(self, epoch: int) -> NDArray[np.int64]:
        # RandomState's streams are frozen for good; those of newer generators may change.
        random = np.random.RandomState([self._seed, epoch])
        size = self._batch_size
        batches = [
            random.permutation(clips)[: len(clips) // size * size].reshape(-1, size)
            for clips in self._clips
        ]
        joined: NDArray[np.int64] = np.concatenate(batches)
        return joined if len(batches) == 1 else joined[random.permutation(len(joined))]


def batch_numbers(done: int, steps: int, ranks: int, rank: int, accumulate: int) -> range:
    """Return the batches that `rank` sees in the next `steps` steps, after `done` of all ranks.

    Steps take the batches in turn: rank 0 the first of each round, rank 1 the second, and so on.
    """
    return range(done + rank, done + steps * ranks * accumulate, ranks)
