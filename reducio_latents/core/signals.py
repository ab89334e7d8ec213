"""The signals that ask a process to end."""

from __future__ import annotations

import signal
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

    for number in numbers:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    try:
        yield restore
    finally:
        restore()
