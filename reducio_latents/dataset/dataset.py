"""`LatentDataset`: ready batches from a store, in an order that is a function of a seed."""

from __future__ import annotations

import hashlib
import logging
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor
from torch._utils import ExceptionWrapper
from torch.utils.data import IterableDataset, get_worker_info

from reducio_latents.core.gaussian import FinalRule
from reducio_latents.dataset.batches import BatchReader, LatentBatch, LostBatchError, require_alike
from reducio_latents.dataset.cursor import Cursor, Position, Span
from reducio_latents.dataset.facts import ONE_COLUMN, split_columns
from reducio_latents.dataset.hashing import derive
from reducio_latents.dataset.moving import move_ahead
from reducio_latents.dataset.options import (
    DatasetOptions,
    Part,
    find_global_batch_size,
    find_part,
    parse_options,
    require_rank,
    whole_number,
)
from reducio_latents.dataset.order import SampleOrder, Samples, ShardStream, rank_slice
from reducio_latents.dataset.selection import NOTHING_CHOSEN
from reducio_latents.dataset.source import Source, as_store
from reducio_latents.dataset.state import (
    FRESH,
    REMEDY,
    Identity,
    check_state,
    read_position,
    write_state,
)
from reducio_latents.dataset.wrapping import (
    Wrapping,
    find_wrapping,
    keeps_states,
    tells_own_count,
)
from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.store import Store
from reducio_latents.store.plan import CLIP_SCHEMA
from reducio_latents.store.text_rows import empty_row

if TYPE_CHECKING:
    from reducio_latents.store.decoder import LatentDecoder

log = logging.getLogger(__name__)

StoreLike = Store | str | Path
MAX_WEIGHT_DENOMINATOR = 1_000_000
SELECTION_DIGITS = 16


class LatentDataset(IterableDataset[LatentBatch]):
    """Stream ready batches of latents, and what goes with them, from a store.

        dataset = LatentDataset("pexels.latents", columns=("motion", "caption"), batch_size=64)
        for batch in LatentLoader(dataset, device="cuda"):
            loss = step(batch["latents"], batch["caption"])

    A batch is a dict. B is `batch_size`, n is `clips_per_sample`; with n > 1 every tensor of clips
    has the shape (B, n, ...) and every list holds lists of n.

    ==================  ===========================================================================
    ``bucket``          str, the size that all clips of the batch have: ``16x256x256``. Left out
                        with ``only_tensors=True``
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
    ``caption``         list of B str; one of several, seeded, is chosen; "" if there is none
    ``text``            float16 (B, L, width): token vectors of that caption, zero where there are
                        none; float32 of a column in bfloat16 or 8 bits a value. L is that of the
                        longest text, or ``text_tokens``
    ``text_mask``       bool (B, L), True where there is a token
    ``scores``          float32 (B, K): the store's scores, whose names `info` shows; NaN for none
    ``clip_id``         list of B str; ``video``: list of B str; ``start_s``: float64 (B,), seconds.
                        From the plan; asked for in ``columns`` like all others. So is all else that
                        is known of clips: a score by its name, as `brightness` (and as `motion` is
                        a column, `scores.motion`), float32 (B,); `psnr`; and the columns of the
                        corpus' table by their names: lists of B str, "" for none, or int64, bool
                        or, with NaN for none, float64 (B,)
    ``skipped``         int, only with ``on_error="skip"``: samples of this rank that could not be
                        read, of this batch and of those before it of which nothing was left
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
    num_workers=n)`, torchdata's `StatefulDataLoader` likewise, or the dataset itself; and what
    Accelerate, Lightning and Fabric make of them. See `dataset.wrapping`.

    The dataset sees the commits that there were when it was made; which rank this process is, it
    looks up whenever an iteration begins. A DataLoader with `persistent_workers=True` must begin
    after the process group: its workers keep the rank of then, and are refused later. The dataset
    is picklable; files are opened by each process for itself. Raises ConfigError and StoreError,
    whose messages name the file or option and the remedy.
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
        ranks. Rank and world size, unless given, are those of torch.distributed, or RANK and
        WORLD_SIZE, when an iteration begins; worker processes take those of their parent.
        """
        order, filters, reading = parse_options(options)
        self.columns = _checked_columns(columns)
        self.seed = seed = whole_number(seed, "seed")
        self._given = rank, world_size
        self._sizes = batch_size, global_batch_size
        self._handed: tuple[int, Part, tuple[Part, ...]] | None = None
        stores = _opened(store)
        stored, facts = split_columns(stores[0], self.columns)
        self.sources = [Source(one, stored, filters, facts) for one in stores]
        for name, count in self.missing.items():
            log.warning("%d clips have no %s, so the filters leave them out", count, name)
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
        self._streams = [
            [self._stream(i, bucket, order.window_shards, shuffle) for i in range(len(stores))]
            for bucket in self.buckets
        ]
        self._shuffle, self._drop_last = shuffle, order.drop_last
        self._about: dict[str, Any] = {
            "seed": seed,
            "shuffle": int(shuffle),
            "window_shards": order.window_shards,
            "drop_last": int(order.drop_last),
            "samples": self.num_samples,
            "selection": self._digest(filters.clips_per_sample),
        }
        self.cursor = Cursor()
        """Where iterations stand; loaders move it."""
        self._placed_for: int | None = None
        """Global batch size of the state that was loaded."""
        self._latest: Share | None = None
        self._worker: int | None = None
        """Process of the DataLoader's worker that iterated last."""
        self._is_ahead = False
        """Whether the latest iteration gave out more than has been used."""
        self._share()
        if reading.only_tensors and (names := ", ".join(self._reader.lists(self.buckets[0]))):
            raise ConfigError(
                f"only_tensors=True, and {names} would be no tensor. Leave it out of columns."
            )

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
        """Return the number of batches in the epoch that is on, the same on every rank.

        Loaders that share them out among ranks once more are told how many they will be given.
        """
        wrapping = find_wrapping(self, self._part())
        each = wrapping.place.world_size if wrapping.place else wrapping.elements
        return self.num_batches(self.cursor.epoch) * each

    def __iter__(self) -> Iterator[LatentBatch]:
        epoch = self.begin()
        return epoch.give_out(((number, epoch.read(number)) for number in epoch.numbers), None)

    def begin(self) -> Pass:
        """Start an iteration, as the rank that this process is by now."""
        require_rank(*self._given)
        share = self._share()
        wrapping = self._wrapping(share.part)
        self._is_ahead = wrapping.ahead
        span = self.cursor.begin(share.order.num_batches, wrapping.elements)
        size = share.order.global_batch_size
        if span.first >= span.step and self._placed_for not in (None, size):
            raise ConfigError(
                f"the state that was loaded is of global batches of {self._placed_for} samples, "
                f"and now they are of {size}: there are {share.part.world_size} ranks. "
                f"{FRESH.format(epoch=span.epoch + 1)}"
            )
        # A worker that goes on from an earlier iteration has the rank of then.
        worker = os.getpid() if get_worker_info() else None
        stays = worker is not None and worker == self._worker
        self._worker = worker
        return Pass(self, share, span, wrapping, self._given if stays else None)

    def batch(self, epoch: int, number: int) -> LatentBatch:
        """Return this rank's part of global batch `number` of an epoch: a pure function.

        Safe to call from several threads at once. Raise StoreError if nothing of it can be read.
        """
        share = self._share()
        if not 0 <= number < share.order.num_batches(epoch):
            raise ConfigError(
                f"epoch {epoch} has the batches 0 to {share.order.num_batches(epoch) - 1}, not "
                f"{number}."
            )
        return self.read(share, epoch, number)

    def read(self, share: Share, epoch: int, number: int, *, draw: bool = True) -> LatentBatch:
        """Return a share of a batch; raise LostBatchError if nothing is left of it."""
        if self._is_remote:
            bucket, ahead = share.order.ahead(epoch, number)
            for source, soon in ahead.items():
                self.sources[source].need_soon(self.buckets[bucket], *soon)
        bucket, samples = share.order.batch(epoch, number)
        if share.part.world_size > 1:
            part = rank_slice(len(samples.row), *share.part)
            samples = Samples(*(array[part] for array in samples))
        return self._reader.read(self.buckets[bucket], samples, epoch, draw=draw)

    def num_batches(self, epoch: int = 0) -> int:
        """Return the number of batches in an epoch; it differs only for fractional weights."""
        return self._share().order.num_batches(epoch)

    def decoder(
        self,
        weights: str | os.PathLike[str] | None = None,
        device: torch.device | str = "auto",
        dtype: torch.dtype | str | None = None,
    ) -> LatentDecoder:
        """Return what turns latents like those of the batches into videos; see `Store.decoder`.

        With `normalize="channel"` it undoes that first.
        """
        from reducio_latents.store.decoder import ChannelScale, LatentDecoder

        stores = [source.store for source in self.sources]
        for store in stores:
            store.require_columns(["motion"])
        shapes = {k: v for s in stores for k, v in s.meta.columns["motion"].row_shapes.items()}
        normalized = self._reader.statistics and ChannelScale(*self._reader.statistics)
        return LatentDecoder(
            stores[0], weights, device, dtype, shapes=shapes, normalized=normalized
        )

    @property
    def rank(self) -> int:
        """Which rank this process is."""
        return self._part().rank

    @property
    def world_size(self) -> int:
        """How many ranks there are."""
        return self._part().world_size

    @property
    def global_batch_size(self) -> int:
        """Samples of a batch over all ranks."""
        return find_global_batch_size(*self._sizes, self.world_size)

    def __getstate__(self) -> dict[str, Any]:
        part = self._part()
        return {**self.__dict__, "_handed": (part, find_wrapping(self, part).parts)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self._handed = (os.getpid(), *state["_handed"])

    def _part(self) -> Part:
        """Return which part of each batch this process reads by now."""
        # A worker that was spawned knows nothing of the group: its parent's part came with the
        # dataset. One that was forked has the group itself.
        if get_worker_info() and self._handed and self._handed[0] == os.getpid():
            return self._handed[1]
        return find_part(*self._given)

    def _wrapping(self, part: Part) -> Wrapping:
        """Return what is done with an iteration that begins."""
        found = find_wrapping(self, part)
        # A worker that was spawned does not see who iterates in its parent.
        if get_worker_info() and self._handed and self._handed[0] == os.getpid():
            found = found._replace(parts=self._handed[2])
        if found.parts:
            reading = self._reader.options
            found.require_dispatchable(
                "drop_last=False"
                if not self._drop_last
                else 'on_error="skip"'
                if reading.on_error == "skip"
                else "",
                self._reader.lists(self.buckets[0]),
                "" if reading.text_tokens else self._reader.ragged(),
            )
        return found

    def _share(self) -> Share:
        part, latest = self._part(), self._latest
        if latest is None or latest.part != part:
            size = find_global_batch_size(*self._sizes, part.world_size)
            order = SampleOrder(
                self._streams,
                global_batch_size=size,
                seed=self.seed,
                shuffle=self._shuffle,
                drop_last=self._drop_last,
            )
            self._require_batches(order, part)
            # One assignment: threads may do this at once, and at worst do it twice.
            self._latest = latest = Share(part, order)
        return latest

    @property
    def num_samples(self) -> int:
        """Samples of all stores, each counted once."""
        return sum(int(p.counts.sum()) for s in self.sources for p in s.selection.values())

    @property
    def skipped(self) -> dict[str, int]:
        """Why samples were skipped by this process, and how many; see `on_error`."""
        return dict(self._reader.skipped)

    @property
    def missing(self) -> dict[str, int]:
        """By a name in `filters`: how many clips do not pass because it is not known of them."""
        names = dict.fromkeys(name for source in self.sources for name in source.missing)
        return {name: sum(s.missing.get(name, 0) for s in self.sources) for name in names}

    def final_rule(self, column: str = "motion") -> FinalRule:
        """Return how samples of a column become final latents, as `sample_moments` takes it."""
        store = self.sources[0].store
        store.require_columns([column])
        rule = store.meta.columns[column].final
        if rule is None:
            raise ConfigError(f"column {column} has no rule for final latents.")
        return rule

    def empty_caption(self, column: str = "text") -> Tensor:
        """Return what a column of text has for no caption, for guidance: (tokens, dim), or (dim,).

        Raise StoreError for a column that holds no text, or was imported without it.
        """
        store = self.sources[0].store
        store.require_columns([column])
        row = empty_row(store.meta.columns[column])
        return torch.from_numpy(np.array(store.kind(column).value(row, "")))

    def set_epoch(self, epoch: int) -> None:
        """Let the next iteration be this epoch. The epoch that is on stays where it was loaded.

        Not so where a loader of Accelerate tells its own count, as it does whenever it begins.
        """
        if epoch < 0:
            raise ConfigError(f"epoch must be >= 0, got {epoch}.")
        find_wrapping(self, self._part())
        if tells_own_count():
            return
        if epoch != self.cursor.epoch:
            self.cursor.move(Position(epoch, 0))

    def state_dict(self) -> dict[str, Any]:
        """Return where the latest iteration stands: integers and one short hash.

        Raise ConfigError where DataLoader's workers iterate, who alone know, or a loader of
        Accelerate, which reads ahead.
        """
        position = self.cursor.position()
        if self._is_ahead and self.cursor.is_on and not keeps_states():
            raise ConfigError(
                "Accelerate's loader reads batches ahead, so the dataset cannot tell how far "
                "training is. Give `prepare` a LatentLoader, and take the state of that."
            )
        return write_state(self._identity(), position)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Let the next iteration begin with the batch that comes after those given out.

        Raise ConfigError for a state of another store, selection, seed or global batch size.
        """
        check_state(self._identity(), state)
        position = read_position(state)
        last = self.num_batches(position.epoch)
        if position.batch > last + max(0, position.num_workers):
            raise ConfigError(
                f"the state is before batch {position.batch} of epoch {position.epoch}, which has "
                f"{last}. It is damaged."
            )
        self.cursor.move(position)
        self._placed_for = int(state["global_batch_size"])

    def _identity(self) -> Identity:
        known = {**self._about, "global_batch_size": self.global_batch_size}
        return {name: known[name] for name in REMEDY}

    def _stream(self, source: int, bucket: str, window_shards: int, shuffle: bool) -> ShardStream:
        chosen = self.sources[source].selection.get(bucket, NOTHING_CHOSEN)
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
        return hashlib.sha256(text.encode()).hexdigest()[:SELECTION_DIGITS]

    def _require_batches(self, order: SampleOrder, part: Part) -> None:
        """Raise ConfigError if no bucket fills a batch; log those that do not."""
        size = order.global_batch_size
        samples, batches = order.bucket_sizes(0)
        if not any(batches):
            sizes = ", ".join(f"{b}: {n}" for b, n in zip(self.buckets, samples, strict=True))
            raise ConfigError(
                f"the global batch is {size} samples, more than any bucket has ({sizes}). Use a "
                f"batch size of {max(samples) // part.world_size or 1} a rank or less."
            )
        for bucket, count in zip(self.buckets, batches, strict=True):
            if count == 0:
                log.warning(
                    "bucket %s has fewer samples than the global batch of %d: none of it is read",
                    bucket,
                    size,
                )


class Share(NamedTuple):
    """What a rank reads: it is found anew when an iteration begins."""

    part: Part
    order: SampleOrder


class Pass:
    """One iteration over a dataset: gives out batches, and keeps count of where it stands."""

    def __init__(
        self,
        dataset: LatentDataset,
        share: Share,
        span: Span,
        wrapping: Wrapping,
        checked: tuple[int | None, int | None] | None = None,
    ) -> None:
        """`checked`: the rank and size given, where whoever takes a batch must be of the rank."""
        self._dataset, self._span, self._part = dataset, span, share.part
        self._checked, self._wrapping = checked, wrapping
        self._shares = [share._replace(part=part) for part in wrapping.parts] or [share]
        end = share.order.num_batches(span.epoch) * len(self._shares)
        self.numbers = range(span.first, end, span.step)
        """Of the elements to read: batches, or the parts of all ranks of each."""

    def read(self, number: int, *, draw: bool = True) -> LatentBatch | LostBatchError:
        """Return an element, or why nothing of it is left. Safe to call from several threads."""
        batch, part = divmod(number, len(self._shares))
        try:
            return self._dataset.read(self._shares[part], self._span.epoch, batch, draw=draw)
        except LostBatchError as err:
            return err

    def give_out(
        self,
        results: Iterable[tuple[int, LatentBatch | LostBatchError]],
        device: torch.device | None,
    ) -> Iterator[LatentBatch]:
        """Yield the batches of numbered results, moved to a device if one is given.

        Raise StoreError at the end of an epoch of which nothing could be read.
        """
        return self._wrapping.spread(self._given_out(results, device))  # type: ignore[return-value]

    def _given_out(
        self,
        results: Iterable[tuple[int, LatentBatch | LostBatchError]],
        device: torch.device | None,
    ) -> Iterator[LatentBatch]:
        cursor, numbers = self._dataset.cursor, deque[int]()
        batches = self._kept(results, numbers)
        is_last = False
        for batch in batches if device is None else move_ahead(batches, device):
            number = numbers.popleft()
            is_last = number == self.numbers[-1]
            cursor.gave(self._span, number, is_last=is_last)
            checked = self._checked
            yield batch if checked is None else _Sent(batch, checked, self._part)
        if not (is_last and get_worker_info() is None) and cursor.finish(self._span):
            why = next(iter(self._dataset.skipped), "other workers have logged why")
            raise StoreError(f"nothing of epoch {self._span.epoch} can be read: {why}")

    def _kept(
        self, results: Iterable[tuple[int, LatentBatch | LostBatchError]], numbers: deque[int]
    ) -> Iterator[LatentBatch]:
        lost = 0
        for number, result in results:
            if isinstance(result, LostBatchError):
                self._dataset.cursor.lost()
                lost += result.samples
                continue
            if lost:
                result["skipped"] += lost
                lost = 0
            numbers.append(number)
            yield result


class _Sent(LatentBatch):
    """A batch of a worker that persists; its main process takes it if that has the rank of then."""

    def __init__(self, batch: LatentBatch, *about: Any) -> None:
        super().__init__(batch)
        self._about = about

    def __copy__(self) -> _Sent:
        return _Sent(self, *self._about)

    def __reduce__(self) -> tuple[Any, ...]:
        return _take, (dict(self), *self._about)


class _Refusal(ExceptionWrapper):
    """A DataLoader raises it, also where a thread that pins memory has taken it."""

    def __init__(self, why: str) -> None:
        self.why = why

    def reraise(self) -> None:
        raise ConfigError(self.why)


def _take(
    batch: LatentBatch, given: tuple[int | None, int | None], part: Part
) -> LatentBatch | _Refusal:
    now = find_part(*given)
    if now == part:
        return batch
    return _Refusal(
        f"the DataLoader's workers began as rank {part.rank} of {part.world_size}, and now this is "
        f"rank {now.rank} of {now.world_size}. Make the DataLoader anew after the process "
        "group, or leave out persistent_workers."
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
    if all(name in CLIP_SCHEMA.names for name in columns) or len(set(columns)) < len(columns):
        raise ConfigError(f"columns are {list(columns)}; {ONE_COLUMN}")
    return columns


def _checked_weights(weights: Sequence[float] | None, stores: int) -> list[Fraction]:
    found = [1.0] * stores if weights is None else list(weights)
    numbers = all(isinstance(weight, Real) for weight in found)
    if len(found) != stores or not (numbers and all(0 < w < float("inf") for w in found)):
        raise ConfigError(
            f"weights are {found}; give a number above 0 for each of {stores} stores."
        )
    return [Fraction(weight).limit_denominator(MAX_WEIGHT_DENOMINATOR) for weight in found]
