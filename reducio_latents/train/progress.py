"""How a run shows itself on the terminal, how fast it goes, and how it is asked to end."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Never

from tqdm import tqdm

from reducio_latents.core.signals import ECHO_S, handling

LOG_EVERY_S = 30.0
"""How often a bar is drawn into a file."""
"""A signal that comes again so soon is the same one: torchrun passes on what ranks got as well."""


@contextmanager
def open_bar(desc: str, unit: str, *, shown: bool) -> Iterator[tqdm[Never]]:
    """Open a bar that does not know its length yet: `move_bar` tells it.

    One that never moved shows nothing.
    """
    every_s = 0.1 if sys.stderr.isatty() else LOG_EVERY_S
    bar: tqdm[Never] = tqdm(
        total=0,
        desc=desc,
        unit=f" {unit}",
        dynamic_ncols=True,
        mininterval=every_s,
        maxinterval=max(10.0, every_s),
        delay=1e-9,  # not before something has moved
        disable=not shown,
    )
    try:
        yield bar
    finally:
        if not bar.n:
            bar.delay = float("inf")  # or its end would be shown
        bar.close()


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


class StopAsked(threading.Event):
    """Set once a signal has asked for an end."""

    signal = signal.SIGTERM
    """Which one; of another rank it is not known."""


@contextmanager
def stop_signal() -> Iterator[StopAsked]:
    """Have SIGTERM, which job managers send before they kill, SIGHUP or Ctrl-C ask for a last
    checkpoint.

    A second one, a while later, ends the process as it does elsewhere.
    """
    asked = StopAsked()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    asked_s = 0.0

    def ask(number: int, _: object) -> None:
        nonlocal asked_s
        if not asked.is_set():
            asked_s, asked.signal = time.monotonic(), signal.Signals(number)
            asked.set()
        elif time.monotonic() - asked_s > ECHO_S:
            restore()
            signal.raise_signal(number)

    with handling(ask) as restore:
        yield asked
