"""What a run writes down: the loss of every step, and how fast it goes."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from reducio_latents.files import LocalFiles

COLUMNS = ("step", "epoch", "loss", "grad_norm", "lr")


class LossTable:
    """A CSV file of one row a step. Nothing in it depends on when or how often a run was killed."""

    def __init__(self, path: Path, step: int) -> None:
        """Open the table of a run that stands at `step`; later rows, of a run killed, are cut."""
        self.path = path
        rows = []
        if path.exists():
            lines = path.read_text().splitlines(keepends=True)[1:]
            # A row without its end was torn by a kill, so it is later than any checkpoint.
            whole = [line for line in lines if line.endswith("\n")]
            rows = [line for line in whole if int(line.partition(",")[0]) <= step]
        LocalFiles(path.parent).write(path.name, "".join([",".join(COLUMNS), "\n", *rows]).encode())

    def add(self, row: Mapping[str, float]) -> None:
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)

    def losses(self) -> list[float]:
        with self.path.open(newline="") as file:
            return [float(row["loss"]) for row in csv.DictReader(file)]


class Clock:
    """How fast a run goes, and how much of its time it waits for batches."""

    def __init__(self, clips_per_step: int) -> None:
        self._clips = clips_per_step
        self._start_s, self._waited_s, self._steps = time.perf_counter(), 0.0, 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block as waiting, and one step."""
        start_s = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - start_s
        self._steps += 1

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Do not count the block."""
        start_s = time.perf_counter()
        yield
        self._start_s += time.perf_counter() - start_s

    def pace(self) -> tuple[float, float]:
        """Return clips a second, and the share of the time that was waiting."""
        elapsed_s = time.perf_counter() - self._start_s
        return self._steps * self._clips / elapsed_s, self._waited_s / elapsed_s

    def words(self) -> str:
        clips_per_s, share = self.pace()
        return f"{clips_per_s:.1f} clips/s, {share:.2%} of the time waiting for data"
