"""Rows through zarr-python, for arrays that are compressed or lie in some other way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reducio_latents.dataset.reader import DamagedRowsError, Ints
from reducio_latents.errors import StoreError
from reducio_latents.store import Store


class ZarrColumn:
    """Reads what any Zarr v3 reader can, at a hundredth of the speed of mapped files."""

    def __init__(self, store: Store, column: str, bucket: str, shards: Sequence[int]) -> None:
        self._where = f"{store.files.url}/{bucket}/{column}"
        self._first = np.array(shards, np.int64) * store.meta.shard_rows
        self._array = _open_array(self._where)

    def arrays(self, shards: Ints, rows: Ints, *, pin_memory: bool = False) -> Tensor:
        out = np.empty((len(rows), *self._array.shape[1:]), self._array.dtype)
        for position, row in enumerate((self._first[shards] + rows).tolist()):
            out[position] = self._row(row, position)
        tensor = torch.from_numpy(out)
        return tensor.pin_memory() if pin_memory else tensor

    def payloads(self, shards: Ints, rows: Ints) -> list[bytes]:
        wanted = (self._first[shards] + rows).tolist()
        return [bytes(self._row(row, position)) for position, row in enumerate(wanted)]

    def _row(self, row: int, position: int) -> Any:
        try:
            # A slice: asked for one value of variable length, zarr gives an array in an array.
            return self._array[row : row + 1][0]
        except Exception as err:  # codecs raise what they like
            raise DamagedRowsError(
                f"{self._where}: row {row} cannot be read ({err}). Run `verify`.", [position]
            ) from err


def _open_array(where: str) -> Any:
    import zarr

    try:
        return zarr.open_array(where, mode="r")
    except Exception as err:
        raise StoreError(f"{where} is not an array that zarr can open ({err}).") from err
