"""Loaders of trainers that share out over ranks what a dataset has already shared out.

Accelerate's `prepare`, and so Transformers' Trainer, puts one of two around a DataLoader of an
iterable dataset, in a group of n processes:

- a dispatcher: the first process reads elements, joins n of them and sends every rank its part;
- a shard: every process reads all elements, and keeps one in n of them.

Either would lose the clips that the dataset keeps for other ranks. So the dataset looks at who
asks, and gives a dispatcher the parts of all ranks in turn, and a shard its own part in its own
place among n. Who asks is told by the frames above: nothing else is there before an iteration, and
nothing of these libraries has to be imported.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, TypeVar

from torch.utils.data import default_collate, default_convert

from reducio_latents.dataset.options import Part
from reducio_latents.errors import ConfigError

INSTEAD = (
    "give `prepare` a LatentLoader(dataset, device=...) instead, or leave the DataLoader out of "
    "it: its batches are this rank's already."
)
READY = "a LatentDataset gives ready batches: use DataLoader(dataset, batch_size=None)."
DISPATCHER, SHARD = "DataLoaderDispatcher", "IterableDatasetShard"
PREPARED = (DISPATCHER, "DataLoaderShard")
COUNTING = (*PREPARED, "_FabricDataLoader")
_MODULES = (
    "accelerate.data_loader",
    "lightning.fabric.wrappers",
    "lightning_fabric.wrappers",
    "torch.utils.data.",
    "torchdata.",
    "transformers.trainer_pt_utils",
)
ElementT = TypeVar("ElementT")


class Wrapping(NamedTuple):
    """What those who ask a dataset, for batches or how many there are, do with them."""

    parts: tuple[Part, ...] = ()
    """Of each global batch, to be given out in turn; none: that of this rank."""
    receivers: int = 0
    """Processes that a dispatcher sends parts of what is given out to."""
    place: Part | None = None
    """Which of how many elements is kept of what is given out; None: all are."""
    ahead: bool = False
    """Whether more is asked for than has been used."""
    collate: Any = None
    """By which function a DataLoader of this very dataset joins elements."""

    @property
    def elements(self) -> int:
        """Elements that a batch is given out in."""
        return len(self.parts) or 1

    def spread(self, batches: Iterator[ElementT]) -> Iterator[ElementT | None]:
        """Put batches in their place, with None, which reaches nobody, in those of other ranks."""
        if self.place is None:
            yield from batches
            return
        rank, world_size = self.place
        for batch in batches:
            yield from [None] * rank
            yield batch
            yield from [None] * (world_size - 1 - rank)

    def require_dispatchable(self, uneven: str, lists: Iterable[str], ragged: str) -> None:
        """Raise ConfigError where a dispatcher would lose clips, or stop, as it joins and cuts.

        `uneven`: which option makes batches so; `lists` and `ragged`: fields that are no tensors,
        and that are not always as long.
        """
        if self.receivers > 1 and uneven:
            raise ConfigError(
                f"Accelerate cuts batches into equal parts, and {uneven} makes others. Leave it "
                f"out, or {INSTEAD}"
            )
        if not self.receivers or self.collate is not default_convert:
            return
        if names := ", ".join(lists):
            raise ConfigError(
                f"Accelerate sends tensors alone, and a batch has {names}. Make the dataset with "
                f"only_tensors=True and without columns of texts. Or {INSTEAD}"
            )
        if len(self.parts) > 1 and ragged:
            raise ConfigError(
                f"Accelerate joins batches, whose {ragged} is as long as the longest of each. "
                f"Make the dataset with text_tokens=N. Or {INSTEAD}"
            )


def find_wrapping(dataset: object, part: Part) -> Wrapping:
    """Return what those who have called do with what a dataset gives, that reads a part here.

    Raise ConfigError where that would lose clips, give some twice, or add an axis.
    """
    askers = [asker for asker, _ in _askers()]
    kinds = [type(asker).__name__ for asker in askers]
    shard = next((a for a, k in zip(askers, kinds, strict=True) if k == SHARD), None)
    is_direct = getattr(shard, "dataset", None) is dataset
    outer = shard if is_direct else dataset
    collates = (
        a.collate_fn
        for a in askers
        if getattr(a, "dataset", None) is outer
        if a is not shard and hasattr(a, "collate_fn")
    )
    found = Wrapping(ahead=any(kind in PREPARED for kind in kinds), collate=next(collates, None))
    if found.collate is default_collate:
        raise ConfigError(READY)
    keeps_states = any(getattr(asker, "use_stateful_dataloader", False) for asker in askers)
    if shard is not None and shard.num_processes > 1:
        _require_same(shard.num_processes, part)
        if not is_direct or keeps_states:
            what = "keep the state" if is_direct else "share out what is made"
            raise ConfigError(
                f"Accelerate cannot {what} of a dataset that is shared out: {INSTEAD}"
            )
        return found._replace(place=_place(shard))
    if DISPATCHER in kinds:
        dispatcher = askers[kinds.index(DISPATCHER)]
        processes = getattr(getattr(dispatcher, "state", None), "num_processes", part.world_size)
        _require_same(processes, part)
        if keeps_states and processes > 1:
            raise ConfigError(
                "Accelerate's use_stateful_dataloader would keep the state of any rank, and with "
                f"dispatch_batches only the first one reads: {INSTEAD}"
            )
        count = 1 if getattr(dispatcher, "split_batches", False) else processes
        parts = tuple(Part(rank, count) for rank in range(count))
        return found._replace(parts=parts, receivers=processes)
    return found


def tells_own_count() -> bool:
    """Whether a loader is asking by itself: its count of epochs begins at 0 in every process."""
    return any(type(a).__name__ in COUNTING and name == "__iter__" for a, name in _askers())


def keeps_states() -> bool:
    """Whether a loader asks that keeps states, and takes them when they are right."""
    return any(type(asker).__module__.startswith("torchdata.") for asker, _ in _askers())


def _place(shard: Any) -> Part:
    if shard.batch_size is None:
        shard.batch_size = 1  # it multiplies by it; an element is a batch here
    size = shard.batch_size
    if getattr(shard, "split_batches", False):
        size //= shard.num_processes
    if size != 1:
        raise ConfigError(READY)
    return Part(shard.process_index, shard.num_processes)


def _require_same(processes: int, part: Part) -> None:
    if processes != part.world_size:
        raise ConfigError(
            f"Accelerate has {processes} processes, and the dataset {part.world_size} ranks. Leave "
            "rank and world_size out, so that it finds them."
        )


def _askers() -> Iterator[tuple[Any, str]]:
    """Yield objects of these libraries whose methods have called, from below, and which methods.

    No other frame is looked into: what its variables hold would be kept for as long as it runs.
    """
    frame = sys._getframe()
    while frame is not None:
        if str(frame.f_globals.get("__name__")).startswith(_MODULES):
            yield frame.f_locals.get("self"), frame.f_code.co_name
        frame = frame.f_back  # type: ignore[assignment]
