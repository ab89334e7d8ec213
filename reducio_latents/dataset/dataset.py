"""`LatentDataset`: ready batches from a store, in an order that is a function of a seed."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any, Unpack

from torch.utils.data import IterableDataset

from reducio_latents.core.gaussian import FinalRule
from reducio_latents.dataset.batches import Batch, BatchReader, require_alike
from reducio_latents.dataset.cursor import Cursor, Position, Span
from reducio_latents.dataset.hashing import derive
from reducio_latents.dataset.options import (
    DatasetOptions,
    find_global_batch_size,
    find_ranks,
    parse_options,
    whole_number,
)
from reducio_latents.dataset.order import BatchOrder, Samples, ShardStream, rank_slice
from reducio_latents.dataset.selection import EMPTY
from reducio_latents.dataset.source import PLAN_FIELDS, Source, as_store
from reducio_latents.dataset.state import Identity, check_state, read_position, write_state
from reducio_latents.errors import ConfigError
from reducio_latents.store import Store

logger = logging.getLogger(__name__)

StoreLike = Store | str | Path
MAX_WEIGHT_DENOMINATOR = 1_000_000
HASH_DIGITS = 16


class LatentDataset(IterableDataset[Batch]):
    """Stream ready batches of latents, and what goes with them, from a store.

        dataset = LatentDataset("pexels.latents", columns=("motion", "caption"), batch_size=64)
        for batch in LatentLoader(dataset, device="cuda"):
            loss = step(batch["latents"], batch["caption"])

    A batch is a dict. B is `batch_size`, n is `clips_per_sample`; with n > 1 every tensor of clips
    has the shape (B, n, ...) and every list holds lists of n.

    ==================  ===========================================================================
    ``bucket``          str, the size that all clips of the batch have: ``16x256x256``
    ``latents``         float32 (B, D, t, h, w): final latents of column ``motion``, what a DiT
                        trains on. A draw from the posterior, seeded by (seed, epoch, clip)
    ``motion``          instead of it, with ``latents="moments"``: float16 (B, 2D, t, h, w), the
                        stored mean, then log-variance. Draw by ``sample_moments`` on the GPU
                        A store of imported samples has a column ``latents`` instead of ``motion``;
                        name it in ``columns``. Those are float32, too, and the same every epoch
    ``content_image``   uint8 (B, 3, H, W) in [0, 255], or a list of bytes with ``images="bytes"``
    ``content_latent``  float32 (B, D, h, w) final latents, or stored moments (B, 2D, h, w)
    ``content_clip``    float16 (B, tokens, width); float32 of a column in 8 bits a value
    ``content_clip_pooled``
                        float16 (B, width)
    ``frame_times``     float64 (B, T): when each frame appears, seconds from the first shown one
    ``caption``         list of B str; one of several, seeded, is chosen; "" where there is none
    ``text``            float16 (B, L, width): token vectors of that caption, zero where there are
                        none; float32 of a column in bfloat16 or 8 bits a value. L is that of the
                        longest text, or ``text_tokens``
    ``text_mask``       bool (B, L), True where there is a token
    ``clip_id``         list of B str; ``video``: list of B str; ``start_s``: float64 (B,), seconds.
                        From the plan; asked for in ``columns`` like all others
    ``skipped``         int, only with ``on_error="skip"``: samples of this rank that the batch
                        lacks because they could not be read
    ==================  ===========================================================================

    **Order.** Global batch k of epoch e depends on the store's index, the filters, seed, e, k and
    the global batch size alone: rank r takes the r-th part of it, and worker w of W takes every
    W-th batch. So all ranks have the same number of batches, and each clip comes once per epoch
    (but for each bucket's last incomplete batch). How well it is shuffled: `window_shards`.

    **Resume.** `state_dict()` is a few integers and a hash. `load_state_dict` makes the next batch
    come next, also on another number of ranks or workers with the same global batch size, without
    reading what came before. Each iteration is one epoch; the one after it is the next epoch, with
    or without `set_epoch`. An iteration that was broken off does not count: the next one begins
    where it began, unless the state was loaded.

    **Loaders.** `LatentLoader` (threads, the fastest), `DataLoader(dataset, batch_size=None,
    num_workers=n)`, torchdata's `StatefulDataLoader` likewise, or the dataset itself.

    The dataset sees the commits that there were when it was made. It is picklable; files are
    opened by each process for itself. Raises ConfigError and StoreError, whose messages name the
    file or option and the remedy.
    """

    def __init__(
        self,
        store: StoreLike | Sequence[StoreLike],
        columns: Sequence[str] = ("motion",),
        *,
        batch_size: int | None = None,
        global_batch_size: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        weights: Sequence[float] | None = None,
        **options: Unpack[DatasetOptions],
    ) -> None:
        """Open a store, or several that are mixed as in `mix`.

        `batch_size` counts samples per rank, `global_batch_size` instead of it those over all
        ranks. Rank and world size are found in torch.distributed or in RANK and WORLD_SIZE.
        """
        order, filters, reading = parse_options(options)
        self.columns = _checked_columns(columns)
        self.seed = seed = whole_number(seed, "seed")
        self.rank, self.world_size = find_ranks(rank, world_size)
        size = find_global_batch_size(batch_size, global_batch_size, self.world_size)
        self.global_batch_size = size
        stored = [name for name in self.columns if name not in PLAN_FIELDS]
        self.sources = [Source(s, stored, filters) for s in _opened(store)]
        require_alike(self.sources, stored)
        self._is_remote = any(source.is_remote for source in self.sources)
        self._weights = _checked_weights(weights, len(self.sources))
        self._reader = BatchReader(
            self.sources,
            self.columns,
            reading,
            seed=seed,
            window_shards=order.window_shards,
            clips_per_sample=filters.clips_per_sample,
        )
        self.buckets = sorted({bucket for source in self.sources for bucket in source.selection})
        """Names of the buckets that batches come from."""
        self._order = BatchOrder(
            [
                [
                    self._stream(i, bucket, order.window_shards, shuffle)
                    for i in range(len(self.sources))
                ]
                for bucket in self.buckets
            ],
            global_batch_size=size,
            seed=seed,
            shuffle=shuffle,
            drop_last=order.drop_last,
        )
        self._identity = Identity(
            seed=seed,
            global_batch_size=size,
            shuffle=int(shuffle),
            window_shards=order.window_shards,
            drop_last=int(order.drop_last),
            samples=self.num_samples,
            selection=self._digest(filters.clips_per_sample),
        )
        self.cursor = Cursor()
        """Where iterations stand; loaders move it."""
        self._require_batches()

    @classmethod
    def mix(
        cls,
        stores: Sequence[StoreLike],
        weights: Sequence[float] | None = None,
        columns: Sequence[str] = ("motion",),
        **keywords: Any,
    ) -> LatentDataset:
        """Open several stores as one dataset, each batch holding all of them in proportion.

        A store of weight w has each of its clips w times an epoch: twice for 2; for 0.5, half of
        them in one epoch and the other half in the next. All else is as with one store.
        """
        return cls(list(stores), columns, weights=weights, **keywords)

    def __repr__(self) -> str:
        stores = ", ".join(source.store.files.url for source in self.sources)
        return (
            f"LatentDataset({stores}: {', '.join(self.columns)}; {self.num_samples:,} samples in "
            f"{self.num_batches()} batches of {self.global_batch_size}, rank {self.rank} of "
            f"{self.world_size})"
        )

    def __len__(self) -> int:
        """Return the number of batches in the epoch that is on, the same on every rank."""
        return self.num_batches(self.cursor.epoch)

    def __iter__(self) -> Iterator[Batch]:
        return self._iterate(self.cursor.begin())

    def _iterate(self, span: Span | None) -> Iterator[Batch]:
        if span is None:
            return
        for number in range(span.first, self.num_batches(span.epoch), span.step):
            batch = self._batch(span.epoch, number)
            self.cursor.gave(span, number)
            yield batch
        self.cursor.finish(span)

    def batch(self, epoch: int, number: int) -> Batch:
        """Return this rank's part of global batch `number` of an epoch: a pure function.

        Safe to call from several threads at once.
        """
        if not 0 <= number < self.num_batches(epoch):
            raise ConfigError(
                f"epoch {epoch} has the batches 0 to {self.num_batches(epoch) - 1}, not {number}."
            )
        return self._batch(epoch, number)

    def _batch(self, epoch: int, number: int) -> Batch:
        if self._is_remote:
            bucket, ahead = self._order.ahead(epoch, number)
            for source, soon in ahead.items():
                self.sources[source].need_soon(self.buckets[bucket], *soon)
        bucket, samples = self._order.batch(epoch, number)
        if self.world_size > 1:
            part = rank_slice(len(samples.row), self.rank, self.world_size)
            samples = Samples(*(array[part] for array in samples))
        return self._reader.read(self.buckets[bucket], samples, epoch)

    def num_batches(self, epoch: int = 0) -> int:
        """Return the number of batches in an epoch; it differs only for fractional weights."""
        return self._order.num_batches(epoch)

    @property
    def num_samples(self) -> int:
        """Samples of all stores, each counted once."""
        return sum(int(p.counts.sum()) for s in self.sources for p in s.selection.values())

    @property
    def skipped(self) -> dict[str, int]:
        """Why samples were skipped by this process, and how many; see `on_error`."""
        return dict(self._reader.skipped)

    def final_rule(self, column: str = "motion") -> FinalRule:
        """Return how samples of a column become final latents, as `sample_moments` takes it."""
        store = self.sources[0].store
        store.require_columns([column])
        rule = store.meta.columns[column].final
        if rule is None:
            raise ConfigError(f"column {column} has no rule for final latents.")
        return rule

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be this epoch. The epoch that is on stays where it was loaded."""
        if epoch < 0:
            raise ConfigError(f"epoch must be >= 0, got {epoch}.")
        if epoch != self.cursor.epoch:
            self.cursor.move(Position(epoch, 0))

    def state_dict(self) -> dict[str, Any]:
        """Return where the latest iteration stands: integers and one short hash.

        Raise ConfigError where DataLoader's workers iterate, who alone know.
        """
        return write_state(self._identity, self.cursor.position())

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration begin with the batch that comes after those given out.

        Raise ConfigError for a state of another store, selection, seed or global batch size.
        """
        check_state(self._identity, state)
        position = read_position(state)
        last = self.num_batches(position.epoch)
        if position.batch > last + max(0, position.num_workers):
            raise ConfigError(
                f"the state is before batch {position.batch} of epoch {position.epoch}, which has "
                f"{last}. It is damaged."
            )
        self.cursor.move(position)

    def _stream(self, source: int, bucket: str, window_shards: int, shuffle: bool) -> ShardStream:
        chosen = self.sources[source].selection.get(bucket, EMPTY)
        return ShardStream(
            counts=chosen.counts,
            masks=chosen.masks,
            # Of the bucket's name, so that other buckets do not change its order.
            key=derive(self.seed, source, *bucket.encode()),
            window_shards=window_shards,
            shuffle=shuffle,
            weight=self._weights[source],
        )

    def _digest(self, clips_per_sample: int) -> str:
        parts = [f"{s.digest} {w}" for s, w in zip(self.sources, self._weights, strict=True)]
        text = "\n".join([*parts, str(clips_per_sample)])
        return hashlib.sha256(text.encode()).hexdigest()[:HASH_DIGITS]

    def _require_batches(self) -> None:
        """Raise ConfigError if no bucket fills a batch; log those that do not."""
        samples, batches = self._order.bucket_sizes(0)
        if not any(batches):
            sizes = ", ".join(f"{b}: {n}" for b, n in zip(self.buckets, samples, strict=True))
            raise ConfigError(
                f"the global batch is {self.global_batch_size} samples, more than any bucket has "
                f"({sizes}). Use a batch size of {max(samples) // self.world_size or 1} a rank or "
                "less."
            )
        for bucket, count in zip(self.buckets, batches, strict=True):
            if count == 0:
                logger.warning(
                    "bucket %s has fewer samples than the global batch of %d: none of it is read",
                    bucket,
                    self.global_batch_size,
                )


def _opened(store: StoreLike | Sequence[StoreLike]) -> list[Store]:
    if isinstance(store, Store | str | Path):
        return [as_store(store)]
    stores = list(store) if isinstance(store, Iterable) else []
    if not stores:
        raise ConfigError("no store is given. Name one or more.")
    return [as_store(one) for one in stores]


def _checked_columns(columns: Sequence[str]) -> tuple[str, ...]:
    columns = (columns,) if isinstance(columns, str) else tuple(columns or ())
    if all(name in PLAN_FIELDS for name in columns) or len(set(columns)) < len(columns):
        raise ConfigError(
            f"columns are {list(columns)}; name one or more of the store's, each once. "
            f"{', '.join(PLAN_FIELDS)} may stand beside them."
        )
    return columns


def _checked_weights(weights: Sequence[float] | None, stores: int) -> list[Fraction]:
    found = [1.0] * stores if weights is None else list(weights)
    numbers = all(isinstance(weight, Real) for weight in found)
    if len(found) != stores or not (numbers and all(0 < w < float("inf") for w in found)):
        raise ConfigError(
            f"weights are {found}; give a number above 0 for each of {stores} stores."
        )
    return [Fraction(weight).limit_denominator(MAX_WEIGHT_DENOMINATOR) for weight in found]
