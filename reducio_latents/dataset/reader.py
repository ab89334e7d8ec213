"""What a reader of one column of one bucket does, whatever holds the rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from reducio_latents.errors import StoreError

Ints = NDArray[np.int64]


class DamagedRowsError(StoreError):
    """Rows that cannot be read."""

    def __init__(self, message: str, positions: Iterable[int] = ()) -> None:
        super().__init__(message)
        self.positions = tuple(positions)
        """Which of the rows that were asked for."""


class ColumnReader(Protocol):
    """Reads rows by (position of the shard among those it was opened for, row in the shard).

    Both methods raise DamagedRowsError. Safe to call from several threads at once.
    """

    def arrays(self, shards: Ints, rows: Ints, *, pin_memory: bool = False) -> Tensor:
        """Return rows of one shape as one tensor (N, *shape), in the order asked for."""

    def payloads(self, shards: Ints, rows: Ints) -> list[bytes]:
        """Return rows of any length, in the order asked for."""
