"""Ending a run early on SIGTERM, SIGHUP or SIGINT: the shard in hand is finished, if that does not
take too long, and no other is begun. Spot machines give half a minute."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from reducio_latents.core.signals import handling

GRACE_S = 20.0
"""How long the shard in hand may take after the first signal."""
LAST_S = 10.0
"""How long giving it up may take after that; then the process ends as if it were killed."""


class StoppedError(BaseException):
    """The time to finish the shard in hand is over. What it had so far is given up."""


class Stop:
    """Whether somebody has asked the run to end."""

    def __init__(self) -> None:
        self.signal = 0
        """Number of the signal that asked for it, 0 before."""
        self.on_request: list[Callable[[int], None]] = []
        """Told that number, once."""
        self._at_once = False

    @property
    def requested(self) -> bool:
        return self.signal != 0

    def request(self, number: int) -> None:
        """Ask the run to end after the shard in hand."""
        if not self.requested:
            self.signal = number
            for tell in self.on_request:
                tell(number)
        if self._at_once:
            raise StoppedError

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Have a request end the block by `StoppedError`: nothing in it has to be finished."""
        before, self._at_once = self._at_once, True
        try:
            if self.requested:
                raise StoppedError
            yield
        finally:
            self._at_once = before


@contextmanager
def stop_on_signals(
    grace_s: float = GRACE_S, on_stop: Callable[[float], None] = lambda _: None
) -> Iterator[Stop]:
    """Turn the first of these signals into a request to stop, the second into an end at once,
    unless it is a SIGHUP: terminals and shells say so one after the other.

    `on_stop` is told the seconds that are left, from the signal handler. When they are over,
    `StoppedError` is raised in the main thread, where this must be called.
    """
    stop, running = Stop(), list[threading.Timer]()

    def ask(number: int, _: FrameType | None) -> None:
        if stop.requested and number == signal.SIGHUP:
            return
        if stop.requested:
            os._exit(128 + number)  # workers end with their parent; files are whole or not there
        stop.request(number)  # which may raise StoppedError
        signal.setitimer(signal.ITIMER_REAL, grace_s)
        # A call that does not come back to Python never sees the alarm.
        last = threading.Timer(grace_s + LAST_S, os._exit, [128 + number])
        last.daemon = True
        last.start()
        running.append(last)
        on_stop(grace_s)

    def give_up(*_: object) -> None:
        raise StoppedError

    with handling(ask), handling(give_up, [signal.SIGALRM]):
        try:
            yield stop
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            for last in running:  # else it would end a process that goes on
                last.cancel()
