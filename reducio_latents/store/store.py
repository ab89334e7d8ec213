"""Opening a store to look at it: description, plan, index, commits, single rows."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from reducio_latents.errors import StoreError
from reducio_latents.files import Files, open_files
from reducio_latents.store.commit import Commit, ShardKey
from reducio_latents.store.container import LAYOUTS, Layout
from reducio_latents.store.index import Index, build_index, require_same_clips
from reducio_latents.store.limits import Ranges
from reducio_latents.store.meta import StoreMeta
from reducio_latents.store.plan import Plan, ShardSums, require_plan
from reducio_latents.store.row_kinds import Array, BytesRows, row_kind
from reducio_latents.store.writer import row_checksum

if TYPE_CHECKING:
    import torch

    from reducio_latents.store.decoder import LatentDecoder

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
        return require_plan(self.files)

    def forget_plan(self) -> None:
        """Let go of the plan, some 250 MB a million clips; it is read again when asked for."""
        if vars(self).pop("plan", None) is not None:
            pa.default_memory_pool().release_unused()  # which else keeps it for a later table

    @cached_property
    def index(self) -> Index:
        index = build_index(self.files, prove=False)  # rows are proven when they are read
        for entry in index.entries.values():
            if entry.rows > self.meta.shard_rows:
                raise StoreError(
                    f"{self.files.url}: the commit of {entry.key} {entry.column} has {entry.rows} "
                    f"rows, a shard has {self.meta.shard_rows} at most. Run `verify`."
                )
        return index

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

    @cached_property
    def _sums(self) -> ShardSums:
        return ShardSums(self.files)

    def commit(self, key: ShardKey, column: str) -> Commit:
        """Return a commit that is of the plan's clips; raise StoreError for any other."""
        commit = Commit.read(self.files, key, column)
        require_same_clips(self.files, commit, self._sums)
        return commit

    def ranges(self, commit: Commit) -> Ranges:
        """Return (offset, length) of each row's payload in `commit.file`; (-1, 0) if empty."""
        return self.layout.locate(self.files, self.meta, commit)

    @property
    def layout(self) -> Layout:
        return LAYOUTS[self.meta.container]

    def kind(self, column: str) -> BytesRows:
        """Return what the rows of a column are."""
        return row_kind(self.meta.columns[column])

    def read_row(self, key: ShardKey, row: int, column: str) -> Array | bytes | None:
        """Return one row, its checksum proven, or None if the clip failed.

        One small read a row: for looking at things, not for training.
        """
        return self.row_reader(key, column)(row)

    def row_reader(
        self, key: ShardKey, column: str, commit: Commit | None = None
    ) -> Callable[[int], Array | bytes | None]:
        """Return what does that for the rows of a shard, whose places are looked up once."""
        commit = commit or self.commit(key, column)
        ranges = self.ranges(commit)

        def read(row: int) -> Array | bytes | None:
            if not 0 <= row < commit.rows:
                raise StoreError(
                    f"{self.files.url}: shard {key} has {commit.rows} rows, not {row}."
                )
            offset, length = map(int, ranges[row])
            if offset < 0:
                return None
            where = f"{self.files.url}/{commit.file}: row {row}"
            try:
                payload = self.files.read_range(commit.file, offset, length)
            except (FileNotFoundError, NotADirectoryError) as err:
                raise StoreError(f"{where} is missing. Run `verify` to see what it costs.") from err
            if row_checksum(payload) != commit.row_crc32c[row]:
                raise StoreError(
                    f"{where} does not match its checksum. Run `verify` to see all the damage."
                )
            return self.decode_row(payload, key.bucket, column)

        return read

    def decode_row(self, payload: bytes, bucket: str, column: str) -> Array | bytes:
        """Turn a row's payload into the array or the bytes that it stands for."""
        return self.kind(column).decode(payload, bucket)

    def decoder(
        self,
        weights: str | os.PathLike[str] | None = None,
        device: torch.device | str = "auto",
        dtype: torch.dtype | str | None = None,
    ) -> LatentDecoder:
        """Return what turns final latents into videos: the model that made column `motion`.

        It loads that model when it is first asked to decode, and refuses any other by its
        fingerprint. weights: where they are now, by default where the store remembers them to be.
        device: `auto` is a GPU if there is one. dtype: of the model, float32 by default.
        """
        from reducio_latents.store.decoder import LatentDecoder  # imports torch

        return LatentDecoder(self, weights, device, dtype)


def open_store(path: str | Path) -> Store:
    """Open the latent store at a directory or a URL; raise StoreError if there is none."""
    return Store(open_files(path))
