"""From the samples of a batch to the batch: rows gathered, decoded, and turned into latents."""

from __future__ import annotations

import logging
import threading
import zlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from reducio_latents.dataset import fields
from reducio_latents.dataset.facts import SCORES_COLUMN, batch_type, score_names
from reducio_latents.dataset.hashing import derive
from reducio_latents.dataset.order import Samples
from reducio_latents.dataset.reader import ColumnReader, DamagedRowsError
from reducio_latents.dataset.rows import BatchRows
from reducio_latents.dataset.sampling import Undrawn, normalize_channels
from reducio_latents.dataset.source import Source
from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.store.row_kinds import (
    ArrayRows,
    FinalLatentsRows,
    Int8TokenRows,
    MomentsRows,
    TokenVectorRows,
    row_kind,
)
from reducio_latents.store.text_rows import empty_row

log = logging.getLogger(__name__)

_counting = threading.Lock()

LatentBatch = dict[str, Any]
MOMENTS = "moments"
TRAINED_ON = ("motion", "latents")
"""Columns that give what a diffusion model trains on; the other one is of imported samples."""
NOISE, CAPTION, DROPOUT = range(3)
"""What a clip's random key is for."""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How rows become a batch."""

    latents: Literal["sample", "mean", "moments"] = "sample"
    """What a column of moments is turned into: final latents of a draw from the posterior, which
    (seed, epoch, clip) decides; those of its mean; or nothing, the moments as they are stored."""
    normalize: Literal["channel"] | None = None
    """`channel`: final latents of `motion` minus the store's mean, over its standard deviation."""
    images: Literal["tensor", "bytes"] = "tensor"
    """Whether image columns are decoded."""
    text_tokens: int | None = None
    """Tokens that `text` is padded or cut to; None for the longest of the batch."""
    text_dropout: float = 0.0
    """Share of clips, drawn by (seed, epoch, clip), whose texts are those of the empty caption, of
    all columns of text at once: for classifier-free guidance."""
    checksums: Literal["index", "full"] = "full"
    """What is proven when a shard is opened: the checksum of every row and that they are of the
    plan's clips; or the checksum of its index alone, which saves some 1 % of the time."""
    on_error: Literal["raise", "skip"] = "raise"
    """What a row that cannot be read does: end the iteration, or make its batch smaller. A batch of
    which nothing is left is not given out, so ranks may then differ in how many they give. Skipped
    rows are logged, and counted in `skipped` of their batch, or of the next that is given out. An
    epoch of which nothing is left is an error."""
    only_tensors: bool = False
    """Whether batches hold nothing else, as loaders want that join or send them: `bucket` is left
    out, and columns that give lists are refused."""
    pin_memory: bool = False
    """Gather into page-locked memory, which is copied to a GPU without waiting. Without a GPU, and
    in worker processes, which cannot pass it on, it changes nothing."""

    def __post_init__(self) -> None:
        if self.normalize and self.latents == MOMENTS:
            raise ConfigError(
                'normalize="channel" is about final latents, and latents="moments" gives none. '
                "Normalise after `sample_moments`, or leave one of them out."
            )
        if self.only_tensors and self.on_error == "skip":
            raise ConfigError(
                'on_error="skip" counts in each batch what was skipped, which is no tensor. Leave '
                "it or only_tensors out."
            )
        if self.text_tokens is not None and self.text_tokens < 1:
            raise ConfigError(f"text_tokens must be >= 1, got {self.text_tokens}.")
        if not 0 <= self.text_dropout <= 1:
            raise ConfigError(f"text_dropout is a share from 0 to 1, got {self.text_dropout}.")


class LostBatchError(StoreError):
    """No row of a batch can be read."""

    def __init__(self, message: str, samples: int) -> None:
        super().__init__(message)
        self.samples = samples


class BatchReader:
    """Reads batches from one or several stores whose columns are alike."""

    def __init__(
        self,
        sources: Sequence[Source],
        columns: Sequence[str],
        options: ReadOptions,
        *,
        seed: int,
        window_shards: int,
        clips_per_sample: int,
    ) -> None:
        self.options = options
        self.skipped: dict[str, int] = {}
        """Why samples were skipped by this process -> how many."""
        self._pin = options.pin_memory and torch.cuda.is_available()
        self._sources = list(sources)
        self._seed = seed
        self._window_shards = window_shards
        self._clips = clips_per_sample
        stored = sources[0].store.meta.columns
        self._meta = {c: stored[c] for c in columns if c in stored}
        self._facts = {
            name: batch_type([source.fact_types[name] for source in sources])
            for name in sources[0].facts
        }
        self._kinds = {name: row_kind(meta) for name, meta in self._meta.items()}
        self._columns = list(columns)
        self.statistics = _statistics(sources, self._meta) if options.normalize else None
        """Mean and standard deviation of each channel, by which final latents are normalised."""
        for name, kind in self._kinds.items():
            if isinstance(kind, FinalLatentsRows) and options.latents != "sample":
                raise ConfigError(
                    f"column {name} of {sources[0].store.files.url} holds samples, drawn once when "
                    f'they were made: latents="{options.latents}" cannot be made from them. Leave '
                    "it out."
                )
        if options.text_dropout:
            for name, kind in self._kinds.items():
                if isinstance(kind, TokenVectorRows):
                    empty_row(self._meta[name])
        if options.latents != MOMENTS:
            for name, meta in self._meta.items():
                if isinstance(self._kinds[name], MomentsRows) and meta.final is None:
                    raise ConfigError(
                        f"column {name} has no rule for final latents in the store's description. "
                        'Read it with latents="moments".'
                    )

    def lists(self, bucket: str) -> list[str]:
        """Return the fields of a batch that are no tensors."""
        nothing = Samples(*(np.zeros(0, np.int64) for _ in Samples._fields))
        batch = self.read(bucket, nothing, 0)
        return [name for name, value in batch.items() if not isinstance(value, Tensor)]

    def ragged(self) -> str:
        """Return the column whose vectors are padded to the longest text of a batch, if any."""
        names = (n for n, kind in self._kinds.items() if isinstance(kind, TokenVectorRows))
        return next(names, "")

    def read(self, bucket: str, samples: Samples, epoch: int, *, draw: bool = True) -> LatentBatch:
        """Return the batch of these samples; raise DamagedRowsError or, where all are skipped,
        LostBatchError. Without `draw`, what is made of moments is `Undrawn`.
        """
        skipped = 0
        while True:
            rows = BatchRows(self._sources, bucket, _expand(samples, self._clips))
            try:
                batch = self._build(rows, len(samples.row), epoch, draw)
            except DamagedRowsError as err:
                bad = np.unique(np.array(err.positions, np.int64) // self._clips)
                if self.options.on_error == "raise" or len(bad) == 0:
                    raise
                self._count(str(err), len(bad))
                skipped += len(bad)
                if len(bad) == len(samples.row):
                    raise LostBatchError(f"nothing of a batch can be read: {err}", skipped) from err
                samples = Samples(*(np.delete(array, bad) for array in samples))
                continue
            if self.options.on_error == "skip":
                batch["skipped"] = skipped
            return batch

    def _count(self, why: str, samples: int) -> None:
        with _counting:
            if why not in self.skipped:
                log.warning("skipping what cannot be read: %s", why)
            self.skipped[why] = self.skipped.get(why, 0) + samples

    def _build(self, rows: BatchRows, samples: int, epoch: int, draw: bool) -> LatentBatch:
        is_named = not self.options.only_tensors or "bucket" in self._columns
        batch: LatentBatch = {"bucket": rows.bucket} if is_named else {}
        for name in self._columns:
            if name == "bucket":  # it is there, one for all
                continue
            if name in self._facts and self._sources[0].facts[name].home == SCORES_COLUMN:
                batch[name] = self._score(name, rows)
            elif name in self._facts:
                batch[name] = fields.fact_field(rows.facts_of(name), self._facts[name])
            elif isinstance(self._kinds[name], ArrayRows):
                self._add_arrays(batch, name, rows, epoch, draw)
            else:
                self._add_payloads(batch, name, rows, epoch)
        if self._clips == 1:
            return batch
        return {name: self._in_sequences(value, samples) for name, value in batch.items()}

    def _in_sequences(self, value: Any, samples: int) -> Any:
        """Give what belongs to clips an axis for samples and one for the clips of each."""
        if isinstance(value, Tensor):
            return value.view(samples, self._clips, *value.shape[1:])
        if isinstance(value, Undrawn):
            return replace(value, clips=self._clips)
        if isinstance(value, list):
            return [value[i : i + self._clips] for i in range(0, len(value), self._clips)]
        return value

    def _score(self, name: str, rows: BatchRows) -> Tensor:
        values = rows.arrays(lambda i: self._reader(i, SCORES_COLUMN, rows.bucket), pin=False)
        source = self._sources[0]
        number = score_names(source.store).index(source.facts[name].name)
        return self._pinned(values[:, number].contiguous())

    def _add_arrays(
        self, batch: LatentBatch, name: str, rows: BatchRows, epoch: int, draw: bool
    ) -> None:
        kind, mode = self._kinds[name], self.options.latents
        is_moments = isinstance(kind, MomentsRows) and mode != MOMENTS
        made_here = (is_moments and draw) or isinstance(kind, FinalLatentsRows)
        pin = self._may_pin() and not made_here
        values = rows.arrays(lambda i: self._reader(i, name, rows.bucket), pin=pin)
        if isinstance(kind, Int8TokenRows):
            batch[name] = self._pinned(torch.from_numpy(kind.value(values.numpy(), rows.bucket)))
            return
        if isinstance(kind, FinalLatentsRows):
            batch[name] = self._pinned(self._normalized(name, values.float()))
            return
        if not is_moments:
            batch[name] = values
            return
        undrawn = self._undrawn(name, values, rows, epoch)
        field = "latents" if name == "motion" else name
        batch[field] = self._pinned(undrawn.draw()) if draw else undrawn

    def _undrawn(self, name: str, moments: Tensor, rows: BatchRows, epoch: int) -> Undrawn:
        rule = self._meta[name].final
        assert rule is not None
        keys = None
        if self.options.latents == "sample":
            key = derive(self._seed, NOISE, epoch, zlib.crc32(name.encode()))
            keys = torch.from_numpy(rows.words(key).view(np.int64))
        return Undrawn(moments, keys, rule, self.statistics if name in TRAINED_ON else None)

    def _normalized(self, name: str, latents: Tensor) -> Tensor:
        if self.statistics is None or name not in TRAINED_ON:
            return latents
        return normalize_channels(latents, *self.statistics)

    def _add_payloads(self, batch: LatentBatch, name: str, rows: BatchRows, epoch: int) -> None:
        payloads = rows.payloads(lambda i: self._reader(i, name, rows.bucket))
        # One key for all columns, so that a clip's text is that of its caption.
        words = partial(rows.words, derive(self._seed, CAPTION, epoch))
        share, dropped = self.options.text_dropout, None
        if share:
            key = derive(self._seed, DROPOUT, epoch)
            dropped = lambda: rows.words(key) < share * 2.0**64  # noqa: E731
        options = self.options
        asked = fields.AskedRows(
            name,
            self._kinds[name],
            payloads,
            rows.bucket,
            words,
            dropped,
            options.images,
            options.text_tokens,
        )
        for field, value in fields.payload_fields(asked).items():
            batch[field] = self._pinned(value) if isinstance(value, Tensor) else value

    def _pinned(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._may_pin() else tensor

    def _may_pin(self) -> bool:
        return self._pin and get_worker_info() is None

    def _reader(self, source: int, column: str, bucket: str) -> ColumnReader:
        return self._sources[source].reader(
            column,
            bucket,
            window_shards=self._window_shards,
            check_rows=self.options.checksums == "full",
        )


def _expand(samples: Samples, clips: int) -> Samples:
    """Return the rows of samples of several clips: those that follow the first."""
    if clips == 1:
        return samples
    stream, shard, row = (np.repeat(array, clips) for array in samples)
    return Samples(stream, shard, row + np.tile(np.arange(clips), len(samples.row)))


def _statistics(
    sources: Sequence[Source], columns: Collection[str]
) -> tuple[list[float], list[float]]:
    """Return the mean and standard deviation of each channel of final motion latents."""
    column = next((name for name in TRAINED_ON if name in columns), None)
    if column is None:
        raise ConfigError(
            'normalize="channel" is about motion, which is not among columns. Leave it out.'
        )
    counts, means, squares = [], [], []
    for source in sources:
        found = source.store.meta.statistics.get(f"{column}/all", {}).get("final")
        if found is None:
            raise ConfigError(
                f'normalize="channel" needs the statistics of {column}, which '
                f"{source.store.files.url} does not have yet: they are written when an encode run "
                "ends. Finish it, or leave normalize out."
            )
        mean, std = np.array(found["mean"]), np.array(found["std"])
        kind = source.store.kind(column)
        halves = 2 if isinstance(kind, MomentsRows) else 1
        channels = {kind.shape(bucket)[0] // halves for bucket in source.selection}
        if channels != {len(mean)} or not found["count"][0] > 0:
            raise StoreError(
                f"{source.store.files.url}: the statistics of {column} are of {len(mean)} channels "
                f"and {found['count'][0]:g} values each, and fit no row. Finish the encode run."
            )
        counts.append(found["count"][0])
        means.append(mean)
        squares.append(std**2 + mean**2)
    mean = np.average(means, axis=0, weights=counts)
    std = np.sqrt(np.average(squares, axis=0, weights=counts) - mean**2)
    return mean.tolist(), std.tolist()


def require_alike(sources: Sequence[Source], columns: Sequence[str]) -> None:
    """Raise ConfigError unless rows of all stores may stand in one batch."""
    first = sources[0].store
    for source in sources[1:]:
        for name in columns:
            ours, theirs = first.meta.columns[name], source.store.meta.columns[name]
            if row_kind(ours).alike != row_kind(theirs).alike:
                raise ConfigError(
                    f"column {name} of {first.files.url} and of {source.store.files.url} were made "
                    "by different encoders, so they cannot stand in one batch. "
                    "Encode one of them again, or leave the column out."
                )
