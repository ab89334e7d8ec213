"""The signals that ask a process to end."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
"""SIGHUP is that of a terminal that closes, which the shell says once more."""
ECHO_S = 2.0
"""A signal so soon after the first is the same one, passed on by somebody else as well."""


@contextmanager
def handling(
    handler: Callable[[int, FrameType | None], object], numbers: Sequence[int] = ENDING
) -> Iterator[Callable[[], None]]:
    """Let `handler` take these signals during the block; yield what ends that before.

    A SIGHUP that is ignored stays so, as nohup wants it. The main thread alone may do this.
    """
    before: dict[int, Any] = {}

    def restore() -> None:
        for number, old in before.items():
            signal.signal(number, old)

    def heard(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            _leave_closed_terminal()
        handler(number, frame)

    for number in numbers:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, heard)
    try:
        yield restore
    finally:
        restore()


def _leave_closed_terminal() -> None:
    """Let what is still printed go nowhere: a terminal that is gone answers with errors."""
    for file in (1, 2):
        if stat.S_ISCHR(os.fstat(file).st_mode) and not os.isatty(file):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, file)
            os.close(nothing)
