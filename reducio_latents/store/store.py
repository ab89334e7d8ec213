"""Opening a store to look at it: description, plan, index, commits, single rows."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from reducio_latents.errors import StoreError
from reducio_latents.files import Files, open_files
from reducio_latents.store.commit import Commit, ShardKey
from reducio_latents.store.compression import decompress_row
from reducio_latents.store.container import LAYOUTS
from reducio_latents.store.index import Index, build_index
from reducio_latents.store.meta import StoreMeta
from reducio_latents.store.plan import Plan, read_plan
from reducio_latents.store.writer import row_checksum

IMPORTED = (
    "Its latents are imported samples: a model can be trained on them, LatentDataset(store, "
    "('latents',), ...), but they cannot be decoded or drawn anew."
)


class Store:
    """A store as it was when it was opened; `open_store` makes one."""

    def __init__(self, files: Files) -> None:
        self.files = files
        self.meta = StoreMeta.read(files)

    @cached_property
    def plan(self) -> Plan:
        plan = read_plan(self.files)
        if plan is None:
            raise StoreError(f"{self.files.url} has no plan. Restore its plan folder from a copy.")
        return plan

    def forget_plan(self) -> None:
        """Let go of the plan, some 250 MB a million clips; it is read again when asked for."""
        if vars(self).pop("plan", None) is not None:
            pa.default_memory_pool().release_unused()  # which else keeps it for a later table

    @cached_property
    def index(self) -> Index:
        return build_index(self.files)

    @property
    def columns(self) -> list[str]:
        """Names of the columns that the description lists."""
        return list(self.meta.columns)

    def require_columns(self, names: list[str] | tuple[str, ...]) -> None:
        """Raise StoreError for a column that this store does not have, naming those it has."""
        for name in names:
            if name not in self.meta.columns:
                hint = " " + IMPORTED if name == "motion" and "latents" in self.columns else ""
                raise StoreError(
                    f"{self.files.url} has no column {name!r}; it has {', '.join(self.columns)}."
                    f"{hint}"
                )

    def commit(self, key: ShardKey, column: str) -> Commit:
        return Commit.read(self.files, key, column)

    def ranges(self, commit: Commit) -> NDArray[np.int64]:
        """Return (offset, length) of each row's payload in `commit.file`; (-1, 0) if empty."""
        return LAYOUTS[self.meta.container].locate(self.files, self.meta, commit)

    def read_row(self, key: ShardKey, row: int, column: str) -> NDArray[np.generic] | bytes | None:
        """Return one row, its checksum proven, or None if the clip failed.

        One small read a row: for looking at things, not for training.
        """
        commit = self.commit(key, column)
        offset, length = map(int, self.ranges(commit)[row])
        if offset < 0:
            return None
        payload = self.files.read_range(commit.file, offset, length)
        if row_checksum(payload) != commit.row_crc32c[row]:
            raise StoreError(
                f"{self.files.url}/{commit.file}: row {row} does not match its checksum. "
                "Run `verify` to see all the damage."
            )
        return self.decode_row(payload, key.bucket, column)

    def decode_row(self, payload: bytes, bucket: str, column: str) -> NDArray[np.generic] | bytes:
        """Turn a row's payload into the array or the bytes that it stands for."""
        meta = self.meta.columns[column]
        payload = decompress_row(meta, payload)
        if meta.kind == "bytes":
            return payload
        dtype = np.dtype(meta.dtype).newbyteorder("<")
        return np.frombuffer(payload, dtype).reshape(meta.row_shapes[bucket])


def open_store(path: str | Path) -> Store:
    """Open the latent store at a directory or a URL; raise StoreError if there is none."""
    return Store(open_files(path))
