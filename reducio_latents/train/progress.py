"""How a run shows itself on the terminal, how fast it goes, and how it is asked to end."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Never

from tqdm import tqdm


def open_bar(desc: str, unit: str, *, shown: bool) -> tqdm[Never]:
    """Open a bar that does not know its length yet: `move_bar` tells it."""
    return tqdm(total=0, desc=desc, unit=unit, dynamic_ncols=True, disable=not shown)


def move_bar(bar: tqdm[Never], done: int, total: int) -> None:
    """Say where a bar stands; a jump at its start is no speed."""
    bar.total = total
    if bar.n == 0:
        bar.initial = bar.n = done
    bar.update(done - bar.n)


class Clock:
    """How fast it goes, and how much of the time it waited for batches."""

    def __init__(self, clips_per_step: int) -> None:
        self._clips = clips_per_step
        self._start_s, self._waited_s = time.perf_counter(), 0.0
        self._steps = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the block as waiting, and one step."""
        start_s = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - start_s
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Return clips a second and the share of waiting since the last reading."""
        elapsed_s = time.perf_counter() - self._start_s
        pace = {
            "clips_per_s": self._steps * self._clips / elapsed_s,
            "waiting_share": self._waited_s / elapsed_s,
        }
        self._start_s, self._waited_s, self._steps = time.perf_counter(), 0.0, 0
        return pace


@contextmanager
def stop_signal() -> Iterator[threading.Event]:
    """Have SIGTERM, which job managers send before they kill, ask for a last checkpoint."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)
