"""Where an iteration stands, and in which epoch the next one begins, also across worker processes.

A DataLoader makes new worker processes for every epoch from a dataset that never learns how far
they came. So what they share lies in shared memory: the epoch, and a record of each worker in the
latest run (one pass of a loader). A worker that begins takes its epoch from another one of the same
run, if there is one, or else works it out from the run before: the same epoch, or the next one if
all of its workers came to the end.

No lock is needed. Each worker writes only its own record, and a run's records lie in another bank
than those of the run before. Which run is the latest, and so which bank, is one word, read and
written at once: workers that begin at the same time have all read the same word, and all write the
same one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from reducio_latents.dataset.hashing import derive
from reducio_latents.errors import ConfigError

MAX_WORKERS = 512
RUN, EPOCH, START, WORKERS, DONE, NAME, GAVE, LOST = range(8)
"""What a record of a worker holds. The first record of all is the base: where an iteration begins
if there is no latest run; its RUN is that of the latest run. A run's lowest bit is its bank."""
NO_RUN = 0


class Position(NamedTuple):
    """Where an iteration stands. `worker` is -1 for one that is not split among workers."""

    epoch: int
    batch: int
    """Number in the epoch of the next global batch."""
    worker: int = -1
    num_workers: int = 0
    ended: bool = False
    """Whether a worker has come to the end of its share, so that the next epoch is to come."""


class Span(NamedTuple):
    """Which elements of an epoch to read: `first`, `first + step`, ..."""

    epoch: int
    first: int
    step: int
    elements: int = 1
    """Elements that a global batch is given out in."""


class Cursor:
    """The position of a dataset; copies of it in worker processes share the epoch."""

    def __init__(self) -> None:
        self._memory = _shared(torch.zeros((1 + 2 * MAX_WORKERS, 8), dtype=torch.int64))
        self._forget()

    def _forget(self) -> None:
        """Set what belongs to this process alone."""
        self._position: Position | None = None
        self._loaded: Position | None = None
        self._passes: dict[int, int] = {}
        self._record: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"memory": self._memory}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._memory = _shared(state["memory"])
        self._forget()

    @property
    def epoch(self) -> int:
        """The epoch that is on, or is the next to begin."""
        return self._after(self._run)[0] if get_worker_info() is None else self.position().epoch

    @property
    def is_on(self) -> bool:
        """Whether an iteration of this process has given something out, and not all."""
        return self._position is not None and self._position[:2] != self._after(self._run)

    def begin(self, num_batches: Callable[[int], int] | None = None, elements: int = 1) -> Span:
        """Start an iteration; return what it reads. `num_batches` says how many an epoch has, each
        of which is given out in so many `elements`.
        """
        info = get_worker_info()
        if info is None:
            epoch, start = self._after(self._run)
            self._set_base(epoch, start)
            self._position = Position(epoch, start)
            return Span(epoch, start * elements, 1, elements)
        if info.num_workers > MAX_WORKERS:
            raise ConfigError(f"{info.num_workers} workers are more than {MAX_WORKERS}.")
        loaded, self._loaded = self._loaded, None
        name = self._name(info.seed - info.id)
        run, epoch, start = self._claim(name)
        first, ended = start * elements + info.id, False
        if loaded is not None:
            epoch, start, ended = loaded.epoch - loaded.ended, loaded.batch, loaded.ended
            first = start * elements + info.id if loaded.worker < 0 else start
        self._position = loaded or Position(epoch, start)
        # Who has nothing to give is done before it is asked: others may begin the next epoch first.
        if num_batches is not None:
            end = num_batches(epoch)
            first, start = (end * elements, end) if ended else (first, start)
            ended = first >= end * elements
        record = [run, epoch, start, info.num_workers, int(ended), name, 0, 0]
        self._write(info.id, torch.tensor(record))
        return Span(epoch, first, info.num_workers, elements)

    def gave(self, span: Span, element: int, *, is_last: bool = False) -> None:
        """Note that an element has been given out, the last one of the epoch or another."""
        info = get_worker_info()
        after = element + span.step
        if info is None and is_last:  # who counts batches does not ask whether there is another
            self._set_base(span.epoch + 1, 0)
            self._position = None
            return
        if info is None:
            self._position = Position(span.epoch, after // span.elements)
        else:
            self._position = Position(span.epoch, after, info.id, info.num_workers)
        self._mark(GAVE)

    def lost(self) -> None:
        """Note that a batch could not be read."""
        self._mark(LOST)

    def finish(self, span: Span) -> bool:
        """Note that an iteration has come to its end; return whether the epoch was lost as a whole:
        nothing was given out, by any worker, though there was something to give.
        """
        info = get_worker_info()
        if info is None:
            lost = _is_lost(self._memory[:1]) and span.first == 0
            self._set_base(span.epoch + 1, 0)
            self._position = None
            return lost
        self._position = Position(span.epoch + 1, 0, info.id, info.num_workers, ended=True)
        if not self._mark(DONE):
            return False
        records = self._records(self._run)
        return _all_done(records) and _is_lost(records) and not records[:, START].any()

    def _mark(self, what: int) -> bool:
        """Set a flag in the record of this process, if its run is still the latest."""
        record = self._memory[0] if get_worker_info() is None else self._record
        is_latest = record is not None and int(record[RUN]) == self._run
        if record is not None and is_latest:
            record[what] = 1
        return is_latest

    def position(self) -> Position:
        """Return where the latest iteration stands, or the next one will begin.

        Raise ConfigError in a process whose workers iterate: they alone know.
        """
        in_workers = get_worker_info() is None and self._run != NO_RUN
        if self._position is not None and not in_workers:
            return self._position
        if in_workers and not _all_done(self._records(self._run)):
            raise ConfigError(
                "worker processes are giving out batches, and fetch some ahead, so this copy of "
                "the dataset cannot tell how far training is. Take the state of a LatentLoader or "
                "of torchdata's StatefulDataLoader instead."
            )
        return Position(*self._after(self._run))

    def move(self, position: Position) -> None:
        """Let the next iteration begin at a position."""
        info = get_worker_info()
        if position.worker >= 0:
            here = (-1, 0) if info is None else (info.id, info.num_workers)
            if here != (position.worker, position.num_workers):
                raise ConfigError(
                    f"this state is of worker {position.worker} of {position.num_workers}, a part "
                    "of the state of a StatefulDataLoader. Load the whole one into such a loader "
                    "with as many workers."
                )
        if info is None:
            self._set_base(position.epoch, position.batch)
            self._position = None
        else:
            self._loaded = self._position = position

    def _set_base(self, epoch: int, start: int) -> None:
        self._memory[1:, RUN] = NO_RUN
        self._memory[0] = torch.tensor([NO_RUN, epoch, start, 0, 0, 0, 0, 0])

    @property
    def _run(self) -> int:
        """The latest run of worker processes, if nothing came after it."""
        return int(self._memory[0, RUN])

    def _bank(self, run: int) -> Tensor:
        start = 1 + (run & 1) * MAX_WORKERS
        return self._memory[start : start + MAX_WORKERS]

    def _records(self, run: int) -> Tensor:
        records = self._bank(run)
        return records[records[:, RUN] == run]

    def _after(self, run: int) -> tuple[int, int]:
        """Return the epoch and batch where the iteration after a run begins."""
        if run == NO_RUN:
            return int(self._memory[0, EPOCH]), int(self._memory[0, START])
        records = self._records(run)
        epoch = int(records[:, EPOCH].max())
        return (epoch + 1, 0) if _all_done(records) else (epoch, int(records[:, START].min()))

    def _name(self, base_seed: int) -> int:
        """Name this pass of the loader: its workers have one seed, and all count their passes."""
        self._passes[base_seed] = self._passes.get(base_seed, 0) + 1
        return derive(base_seed, self._passes[base_seed]) >> 2

    def _claim(self, name: int) -> tuple[int, int, int]:
        """Return the run of a pass, its epoch and its start; of its other workers, if one began."""
        latest = self._run
        records = self._records(latest) if latest != NO_RUN else self._memory[:0]
        # A loader that is seeded anew for every epoch names all its passes alike.
        if len(records) and int(records[0, NAME]) == name and not _all_done(records):
            return latest, int(records[:, EPOCH].max()), int(records[:, START].min())
        # In the other bank; named after the run before, so that no old record has its number.
        run = (derive(name, latest) >> 2 | 1) << 1 | (1 - (latest & 1))
        return run, *self._after(latest)

    def _write(self, worker: int, record: Tensor) -> None:
        run = int(record[RUN])
        mine = self._record = self._bank(run)[worker]
        mine[RUN] = NO_RUN
        mine[EPOCH:] = record[EPOCH:]
        mine[RUN] = run  # last: from now on the record counts
        self._memory[0, RUN] = run


def _all_done(records: Tensor) -> bool:
    """Whether these are the records of all workers of a run, each of which came to its end."""
    done = int(records[:, DONE].sum())
    return len(records) > 0 and done == len(records) == int(records[:, WORKERS].max())


def _is_lost(records: Tensor) -> bool:
    return bool(records[:, LOST].any()) and not records[:, GAVE].any()


def _shared(memory: Tensor) -> Tensor:
    memory.share_memory_()  # type: ignore[no-untyped-call]
    return memory
