"""One store as a dataset reads it: what was selected, and the open readers of this process."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np

from reducio_latents.dataset.facts import (
    SCORES_COLUMN,
    fact_types,
    find_fact,
    open_column,
    shard_fact,
)
from reducio_latents.dataset.filters import Filters
from reducio_latents.dataset.reader import ColumnReader, Ints
from reducio_latents.dataset.selection import BucketSelection, select, selection_digest
from reducio_latents.files.cache import CachedFiles
from reducio_latents.files.protocol import Origin
from reducio_latents.store import Store, open_store
from reducio_latents.store.commit import ShardKey

MIN_OPEN_SHARDS = 256
KEPT_FIELDS = 1024


class Source:
    """A store, as it was when it was opened, and the part of it that is read."""

    def __init__(
        self, store: Store, columns: Sequence[str], filters: Filters, facts: Sequence[str] = ()
    ) -> None:
        """`facts` are names of what is known of clips that batches are to hold."""
        self.store = _within_reach(store)
        self.facts = {name: find_fact(self.store, name) for name in facts}
        if any(fact.home == "scores" for fact in self.facts.values()):
            columns = list(dict.fromkeys([*columns, SCORES_COLUMN]))
        self.columns = tuple(columns)
        choice = select(self.store, columns, filters)
        self.selection: dict[str, BucketSelection] = choice.packed()
        self.missing = choice.missing
        """By a name in the filters: clips of which it is not known."""
        self.fact_types = fact_types(self.store, self.facts)
        self.store.forget_plan()
        self.digest = selection_digest(store, columns, self.selection)
        self._drop_handles()

    def _drop_handles(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._readers: dict[tuple[str, str], ColumnReader] = {}
        self._fields: OrderedDict[tuple[str, str, int], list[Any]] = OrderedDict()
        self._hints: dict[str, tuple[tuple[int, int], list[str]]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # Files are opened, and the plan is read, by each process for itself; the index is not:
        # all see the commits that there were when the dataset was made.
        names = ("columns", "selection", "digest", "missing", "facts", "fact_types")
        kept = {name: getattr(self, name) for name in names}
        return kept | {"files": self.store.files, "index": self.store.index}

    def __setstate__(self, state: dict[str, Any]) -> None:
        kept = dict(state)
        self.store = Store(kept.pop("files"))
        self.store.index = kept.pop("index")
        self.__dict__ |= kept
        self._drop_handles()

    def reader(
        self, column: str, bucket: str, *, window_shards: int, check_rows: bool
    ) -> ColumnReader:
        """Return this process's reader of a column, opened when it is first asked for.

        Shards are counted as in `selection[bucket].shards`.
        """
        if self._pid != os.getpid():  # locks and handles must not be used across a fork
            self._drop_handles()
        key = (column, bucket)
        if key not in self._readers:
            with self._lock:
                if key not in self._readers:
                    # Two windows are read where a batch lies across their border.
                    capacity = max(MIN_OPEN_SHARDS, 2 * window_shards)
                    shards = self.selection[bucket].shards
                    self._readers[key] = open_column(
                        self.store, column, bucket, shards, capacity, check_rows=check_rows
                    )
        return self._readers[key]

    def facts_of(self, name: str, bucket: str, shards: Ints, rows: Ints) -> list[Any]:
        """Return a fact of plan or quality.parquet for each row.

        Shards are counted as in `reader`. What is not known is None.
        """
        if self._pid != os.getpid():
            self._drop_handles()
        values = {n: self._shard_facts(name, bucket, n) for n in np.unique(shards).tolist()}
        pairs = zip(shards.tolist(), rows.tolist(), strict=True)
        return [values[shard][row] for shard, row in pairs]

    def _shard_facts(self, name: str, bucket: str, shard: int) -> list[Any]:
        """Return a fact of all rows of a shard; those used last are kept as lists."""
        key = (name, bucket, shard)
        with self._lock:
            if key in self._fields:
                self._fields.move_to_end(key)
                return self._fields[key]
            number = self.selection[bucket].shards[shard]
            values = shard_fact(self.store, self.facts[name], bucket, number)
            self._fields[key] = values
            if len(self._fields) > KEPT_FIELDS:
                self._fields.popitem(last=False)
            return values

    @property
    def is_remote(self) -> bool:
        """Whether files come from elsewhere, so that it pays to say which are needed soon."""
        return isinstance(self.store.files, CachedFiles)

    def need_soon(self, bucket: str, window: tuple[int, int], shards: Ints) -> None:
        """Have the files of these shards fetched in the background, if `window` is a new one."""
        files = self.store.files
        if self._hints.get(bucket, (None,))[0] == window or not isinstance(files, CachedFiles):
            return
        numbers, entries = self.selection[bucket].shards, self.store.index.entries
        keys = [ShardKey(bucket, numbers[shard]) for shard in shards.tolist()]
        paths = [entries[column, key].file for key in keys for column in self.columns]
        with self._lock:
            self._hints[bucket] = (window, list(dict.fromkeys(paths)))
            files.prefetch([path for _, hint in self._hints.values() for path in hint])


def _within_reach(store: Store) -> Store:
    """Return the store with its files on this machine: those from elsewhere through a cache."""
    if isinstance(store.files, CachedFiles) or not hasattr(store.files, "stream"):
        return store
    sums = {e.file: e.file_sha256 for e in store.index.entries.values() if e.file_sha256}
    cached = CachedFiles(cast(Origin, store.files), sha256=sums)
    cached.make_folder()
    near = Store(cached)
    near.index = store.index
    return near


def as_store(store: Store | str | Path) -> Store:
    """Return an opened store as it is, and open one that is named by its path or URL."""
    return store if isinstance(store, Store) else open_store(store)
