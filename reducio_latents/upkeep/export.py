"""A store's latents as another trainer's cache: `trainer_files` says how each lies.

A clip's files are a function of the store. They appear whole, and what is there is not made again,
so an export that was killed is ended by the same call, and several at once do no harm.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from reducio_latents.conditioning.presets import made_as
from reducio_latents.core.choices import TrainerFormat
from reducio_latents.core.geometry import Bucket
from reducio_latents.errors import StoreError
from reducio_latents.files import Files, LocalFiles
from reducio_latents.store import Store
from reducio_latents.store.commit import ShardKey, commit_path
from reducio_latents.store.meta import ColumnMeta
from reducio_latents.store.plan import REMOVED, first_sums
from reducio_latents.store.row_kinds import Array
from reducio_latents.store.text_rows import POOLED_MEDIA_TYPE, TEXT_MEDIA_TYPE, decode_text_row
from reducio_latents.upkeep.trainer_files import (
    ALWAYS_LOST,
    JOINED_CLIPS,
    TRAINED_FAMILIES,
    TRAINER_FILES,
    ClipFacts,
    ClipTensors,
    Recipe,
    TrainedFamily,
)

EXPORT = "reducio-export.json"
"""What a folder is an export of; readers of caches look past it."""
JOINED_FILE = re.compile(r"\d+x\d+x\d+/shard-\d{6,}-\d{3}\.[0-9a-f]{8}\.parquet")
"""Files of several clips, named by what is in them."""
MOTION, TOKENS, POOLED = "motion", "tokens", "pooled"
NOT_DONE = "not encoded yet"

RowOf = Callable[[int], Array | bytes | None]


@dataclass
class ExportReport:
    """Where the clips of a store went."""

    found: int = 0
    """Clips with a row of their own, but for those that were removed."""
    converted: int = 0
    skipped: int = 0
    """That were there before."""
    failed: Counter[str] = field(default_factory=Counter)
    """Why clips have no files -> how many."""
    bytes: int = 0
    """Of the files that were written now."""
    text: tuple[str, ...] = ()
    """Columns that text is taken from."""
    missing_text: str = ""
    """Why it is taken from none."""
    lost: str = ""
    """What of the store is not there."""

    def __str__(self) -> str:
        return (
            f"{self.found} found = {self.converted} converted + {self.skipped} skipped + "
            f"{self.failed.total()} failed"
        )


def export_store(
    source: Store,
    target: Files,
    name: TrainerFormat,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ExportReport:
    """Write the latents of `source` to `target` as a trainer's own cache of them.

    Call again to go on where it was stopped; clips that were taken out meanwhile go. `progress` is
    told (shards done, shards in all). Raise StoreError where the trainer has no use for the model
    that made the store, or `target` holds something else.
    """
    export = _Export(source, target, name)
    export.claim()
    total = len(source.plan.shards())
    for done, shard in enumerate(export.shards()):
        export.write(shard)
        progress(done + 1, total)
    export.finish()
    return export.report


@dataclass
class _Shard:
    """The clips of a shard, and which can be written."""

    key: ShardKey
    clips: dict[int, ClipFacts] = field(default_factory=dict)
    """By row."""
    failed: Counter[str] = field(default_factory=Counter)
    gone: list[ClipFacts] = field(default_factory=list)
    """Clips that have no files, or not any more."""


class _Export:
    def __init__(self, source: Store, target: Files, name: TrainerFormat) -> None:
        self.source, self.target, self.name = source, target, name
        self.layout = TRAINER_FILES[name]
        self.family = _family(source, name)
        self.recipe = self.layout.recipes[self.family.name]
        columns = source.meta.columns
        self.text, why = _text_columns(columns, self.family, self.recipe)
        self.columns = {MOTION: MOTION, **self.text}
        no_pooled = self.family.pooled and not self.recipe.needs_pooled
        lost = [self.layout.lost, *["pooled vectors of text"] * bool(no_pooled), ALWAYS_LOST]
        tokens = columns[self.text[TOKENS]].config if self.text else {}
        if self.text and self.family.pads and not tokens.get("pads"):
            lost.insert(0, "vectors of padding, which --text-preset cogvideox would make")
        self.report = ExportReport(
            text=tuple(self.text.values()), missing_text=why, lost="; ".join(lost)
        )
        self._joined: set[str] = set()

    def claim(self) -> None:
        """Say what `target` is; raise StoreError if it is something else."""
        if isinstance(self.target, LocalFiles):
            self.target.sweep()
        if self.target.size(EXPORT) is None:
            taken = next(iter(self.target.list("")), None)
            if taken is not None:
                raise StoreError(
                    f"{self.target.url} holds something else ({taken}). Give a new or empty folder."
                )
        if not self.target.create(EXPORT, json.dumps(self._identity(), indent=1).encode()):
            raise StoreError(
                f"{self.target.url} is an export in another format, of another store, or of this "
                "one before its columns or clips changed. Give a new folder."
            )

    def _identity(self) -> dict[str, Any]:
        """Return all that decides which files there are, and their bytes."""
        meta, clips = self.source.meta, hashlib.sha256(first_sums(self.source.files))
        if self.layout.numbered:
            for found in self.shards():
                clips.update("".join(f"{c.clip_id}\n" for c in found.clips.values()).encode())
        return {
            "format": self.name,
            "model": meta.columns[MOTION].encoder,
            "columns": {name: meta.columns[name].fingerprint for name in self.columns.values()},
            "clips": clips.hexdigest(),
        }

    def shards(self) -> Iterator[_Shard]:
        """Yield the clips of every shard."""
        number, fields = 0, ["clip_id", "video", "captions", "status"]
        for planned in self.source.plan.shards():
            shard = _Shard(ShardKey(planned.bucket, planned.shard))
            done = {role: self._done(shard.key, name) for role, name in self.columns.items()}
            for row, clip in enumerate(
                self.source.plan.shard_clips(*shard.key, fields).to_pylist()
            ):
                facts = ClipFacts(
                    clip_id=clip["clip_id"],
                    number=number,
                    bucket=Bucket.parse(planned.bucket),
                    rate_fps=self.source.meta.clip.rate_fps,
                    video=clip["video"],
                    caption=next(iter(clip["captions"]), ""),
                    has_text=bool(self.text),
                )
                lacks = [self.columns[role] for role, rows in done.items() if not rows.get(row)]
                if not lacks and clip["status"] != REMOVED:
                    shard.clips[row] = facts
                    number += 1
                    continue
                shard.gone.append(facts)
                if clip["status"] != REMOVED:
                    known = [rows for rows in done.values() if row in rows]
                    why = "failed" if len(known) == len(done) else NOT_DONE
                    shard.failed[f"{lacks[0]} {why}"] += 1
            yield shard

    def _done(self, key: ShardKey, column: str) -> dict[int, bool]:
        """Return whether each row of a shard has a value; nothing if the shard is not done."""
        if self.source.files.size(commit_path(key, column)) is None:
            return {}
        commit = self.source.commit(key, column)
        return {row: crc is not None for row, crc in enumerate(commit.row_crc32c)}

    def write(self, shard: _Shard) -> None:
        """Write what is missing of a shard, and delete what must not be there."""
        self.report.found += len(shard.clips) + shard.failed.total()
        self.report.failed += shard.failed
        for clip in shard.gone:
            for name in () if self.layout.numbered else self.layout.names(clip, self.family.name):
                self._delete(name)
        rows = {role: _lazily(self.source, shard.key, name) for role, name in self.columns.items()}
        if self.layout.join is not None:
            self._write_joined(shard, rows)
            return
        for row, clip in shard.clips.items():
            names = self.layout.names(clip, self.family.name)
            if all(self.target.size(name) is not None for name in names):
                self.report.skipped += 1
                continue
            files = self._pack(row, clip, rows)
            for name, data in zip(names, files or (), strict=bool(files)):
                self._put(name, data)
            self.report.converted += files is not None

    def _write_joined(self, shard: _Shard, rows: Mapping[str, RowOf]) -> None:
        assert self.layout.join is not None
        clips = list(shard.clips.items())
        for part, begin in enumerate(range(0, len(clips), JOINED_CLIPS)):
            here = clips[begin : begin + JOINED_CLIPS]
            name = _joined_name(shard.key, part, [clip for _, clip in here])
            self._joined.add(name)
            if self.target.size(name) is not None:
                self.report.skipped += len(here)
                continue
            packed = [(clip, self._pack(row, clip, rows)) for row, clip in here]
            good = {clip: records for clip, records in packed if records is not None}
            if good:  # not under the same name where some are damaged: they are tried again
                name = _joined_name(shard.key, part, [*good])
                self._joined.add(name)
                self._put(name, self.layout.join([r for records in good.values() for r in records]))
            self.report.converted += len(good)

    def _pack(self, row: int, clip: ClipFacts, rows: Mapping[str, RowOf]) -> Sequence[Any] | None:
        """Return the files of a clip; None, and why is counted, if a row of it is damaged."""
        try:
            values = {role: rows[role](row) for role in self.columns}
            tensors = self._tensors(values)
        except StoreError as err:
            self.report.failed[str(err)] += 1
            return None
        return self.layout.pack(clip, tensors, self.family.name, self.recipe)

    def _tensors(self, values: Mapping[str, Any]) -> ClipTensors:
        return ClipTensors(
            moments=_tensor(values[MOTION]),
            rule=self.source.meta.columns[MOTION].final or {},
            tokens=self._vectors(TOKENS, values[TOKENS]) if TOKENS in values else None,
            pooled=self._vectors(POOLED, values[POOLED])[0] if POOLED in values else None,
        )

    def _vectors(self, role: str, row: bytes) -> Tensor:
        vectors = _tensor(decode_text_row(row)[0])
        stored = self.source.meta.columns[self.text[role]].config.get("values")
        return vectors.bfloat16() if stored == "bfloat16" else vectors

    def finish(self) -> None:
        """Write what names all clips."""
        every = (clip for shard in self.shards() for clip in shard.clips.values())
        for name, data in self.layout.lists(every).items():
            self._put(name, data)
        for name in list(self.target.list("")) if self.layout.join else ():
            if JOINED_FILE.fullmatch(name) and name not in self._joined:
                self._delete(name)

    def _put(self, name: str, data: bytes) -> None:
        self.target.write(name, data)
        self.report.bytes += len(data)

    def _delete(self, name: str) -> None:
        if self.target.size(name) is not None:
            self.target.delete(name)


def _tensor(array: Any) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")).copy())


def _lazily(source: Store, key: ShardKey, column: str) -> RowOf:
    """Return what reads a row of a shard, its place looked up when the first is asked for."""
    reader = cache(lambda: source.row_reader(key, column))
    return lambda row: reader()(row)


def _family(source: Store, name: TrainerFormat) -> TrainedFamily:
    """Return whose latents a store has; raise StoreError unless the trainer takes them."""
    source.require_columns([MOTION])
    layout, column = TRAINER_FILES[name], source.meta.columns[MOTION]
    family = TRAINED_FAMILIES.get(column.encoder.removeprefix("diffusers:"))
    if family is not None and family.name in layout.recipes:
        return family
    others = [n for n, o in TRAINER_FILES.items() if family and family.name in o.recipes]
    hint = f" For these there is --format {' or '.join(others)}." if others else ""
    raise StoreError(
        f"--format {name} is for latents of {', '.join(layout.recipes)}; those of "
        f"{source.files.url} were made by {column.encoder}.{hint}"
    )


def _text_columns(
    columns: Mapping[str, ColumnMeta], family: TrainedFamily, recipe: Recipe
) -> tuple[dict[str, str], str]:
    """Return the columns that text is taken from, by what they hold; or none, and why."""
    if recipe.without_text or not family.tokens:
        return {}, f"{family.name}'s trainer takes text that no column has"
    wanted = {TOKENS: (TEXT_MEDIA_TYPE, family.tokens)}
    if family.pooled and recipe.needs_pooled:
        wanted[POOLED] = (POOLED_MEDIA_TYPE, family.pooled)
    found = {}
    for role, (content, classes) in wanted.items():
        fitting = [
            name
            for name, column in columns.items()
            if column.content == content
            and column.encoder.rpartition(":")[2] in classes
            and made_as(column.config, family.preset)
        ]
        if not fitting:
            kind = "pooled vectors" if role == POOLED else "token vectors"
            how = f" made with --text-preset {family.preset}" if family.preset else ""
            return {}, f"no column has {kind} of {' or '.join(classes)}{how}"
        other = {name: bool(columns[name].config.get("pads")) != family.pads for name in fitting}
        found[role] = min(fitting, key=lambda name: (other[name], name != "text", name))
    return found, ""


def _joined_name(key: ShardKey, part: int, clips: Sequence[ClipFacts]) -> str:
    ids = hashlib.sha256("\n".join(clip.clip_id for clip in clips).encode()).hexdigest()
    return f"{key.bucket}/shard-{key.shard:06d}-{part:03d}.{ids[:8]}.parquet"
