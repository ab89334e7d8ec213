"""`LatentTable`: any clip of a store by number or id, for looking at things."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from reducio_latents.dataset.facts import SCORES_COLUMN, by_shard, clip_facts, split_columns
from reducio_latents.dataset.source import as_store
from reducio_latents.errors import LatentsError, StoreError
from reducio_latents.store import Store
from reducio_latents.store.commit import WAS_REMOVED, ShardKey
from reducio_latents.store.plan import REMOVED

Entry = dict[str, Any]


class NoSuchClipError(LatentsError, KeyError, IndexError):
    """A clip that the store does not have, or cannot give."""

    __str__ = Exception.__str__


class LatentTable:
    """Read single clips of a store, each row's checksum proven.

    `table[i]` is the i-th clip, in the plan's order, of those that have all of `columns`;
    `table["<clip id>"]` a certain one; a clip that duplicates another has that one's rows. An entry
    is a dict: `clip_id` str, `video` str (its name in the corpus), `start_s` float seconds,
    `bucket` str, and one value a column:

    - `motion`: float16 (2D, t, h, w), the mean, then the log-variance;
    - `content_latent`: float16 (2D, h, w); `frame_times`: float64 (T,);
    - `content_clip`: float16 (tokens, width), or float32 of a column in 8 bits a value;
    - `content_image`: uint8 (3, H, W); `caption`: str, the first if there are several;
    - `text`: float16 (tokens, width) of that caption, or float32 of a column in bfloat16 or 8 bits;
    - `scores`: dict, name -> float, NaN for one that the clip lacks;
    - other arrays: a tensor as stored; other bytes: bytes;
    - what else is known of clips, by name, if it is named: a score (`brightness`, or
      `scores.motion`), `psnr`, a column that the corpus' table had: a value, None if there is none.

    One small read a column, so this is not for training. Raises NoSuchClipError (a KeyError and an
    IndexError) for a clip that does not exist, StoreError for one that is damaged.
    """

    def __init__(self, store: Store | str | Path, columns: Sequence[str] | None = None) -> None:
        """Open a store; `columns` are all of its columns unless they are given."""
        self.store = as_store(store)
        named = self.store.columns if columns is None else columns
        self.columns, self._named = split_columns(self.store, named)
        self._shards = self.store.index.shards(self.columns or [SCORES_COLUMN])

    def __len__(self) -> int:
        return len(self._readable)

    def __iter__(self) -> Iterator[Entry]:
        return (self[number] for number in range(len(self)))

    def __contains__(self, clip_id: object) -> bool:
        return clip_id in self._place_of

    @property
    def clip_ids(self) -> list[str]:
        """Ids of the clips, in order."""
        ids: list[str] = self.store.plan.clips["clip_id"].take(self._readable).to_pylist()
        return ids

    def __getitem__(self, clip: int | str) -> Entry:
        clips, place = self.store.plan.clips, self._place(clip)
        row: dict[str, Any] = clips.slice(place, 1).to_pylist()[0]
        entry: Entry = {name: row[name] for name in ("clip_id", "video", "start_s", "bucket")}
        key = ShardKey(row["bucket"], row["shard"])
        for column in self.columns:
            value = self.store.read_row(key, row["row"], column)
            if value is None:
                raise StoreError(f"{self.store.files.url}: clip {row['clip_id']} has no {column}.")
            entry[column] = self._shown(column, value, key.bucket)
        if self._named:
            entry |= self._facts.slice(place, 1).select(self._named).to_pylist()[0]
        return entry

    def _place(self, clip: int | str) -> int:
        """Return where in the plan's table a clip is."""
        where = self.store.files.url
        if isinstance(clip, str):
            if clip not in self._place_of:
                clips = self.store.plan.clips
                at = pc.index(clips["clip_id"], clip).as_py()
                removed = at >= 0 and clips["status"][at].as_py() == REMOVED
                why = WAS_REMOVED if removed else "failed, or is not done yet"
                why = why if at >= 0 else "is not in its plan"
                raise NoSuchClipError(f"{where}: clip {clip} {why}.")
            return self._place_of[clip]
        if not -len(self) <= clip < len(self):
            raise NoSuchClipError(f"{where} has {len(self)} clips to read, and no number {clip}.")
        return int(self._readable[clip])

    def _shown(self, column: str, row: Any, bucket: str) -> Any:
        where = f"{self.store.files.url}/{column}"
        try:
            value = self.store.kind(column).value(row, bucket)
        except StoreError as err:
            raise StoreError(f"{where}: {err}") from err
        return torch.from_numpy(value.copy()) if isinstance(value, np.ndarray) else value

    @cached_property
    def _facts(self) -> pa.Table:
        return clip_facts(self.store, self._named)

    @cached_property
    def _readable(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Where in the plan's table the clips are that have every column."""
        clips = self.store.plan.clips
        found = np.zeros(len(clips), np.bool_)
        for key, places in by_shard(clips, np.ones(len(clips), np.bool_)):
            if key in self._shards:
                _, failed = self._shards[key]
                rows = clips["row"].take(places).to_numpy()
                found[places] = ~np.isin(rows, list(failed))
        return np.flatnonzero(found)

    @cached_property
    def _place_of(self) -> dict[str, int]:
        return dict(zip(self.clip_ids, self._readable.tolist(), strict=True))
