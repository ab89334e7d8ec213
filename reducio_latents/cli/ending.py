"""How a command ends when something outside ends it: one line, and an exit code that says what."""

from __future__ import annotations

import errno
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

import click

from reducio_latents.cli.show import safe
from reducio_latents.core.text import print_logs_safely
from reducio_latents.errors import LatentsError, TrainingError


class InterruptedBySignal(BaseException):
    """A signal asked the command to end, and nothing is in hand that must be finished first."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def one_line() -> Iterator[None]:
    """Turn whatever ends the block into one line on stderr and an exit code, without a traceback.

    SIGTERM ends it as Ctrl-C does, unless the block listens to it itself.
    """
    print_logs_safely(safe)
    try:
        with _sigterm_raises():
            yield
    except LatentsError as err:
        if not isinstance(err, TrainingError) or not err.signal:
            raise click.ClickException(safe(str(err))) from err
        click.echo(safe(err), err=True)
        raise SystemExit(128 + err.signal) from err
    except click.ClickException as err:
        err.message = safe(err.message)  # type: ignore[misc]
        raise
    except BrokenPipeError:  # the reader of our output, `head` say, has gone
        sys.stderr.close()
        raise SystemExit(0) from None
    except OSError as err:
        raise click.ClickException(safe(_said(err))) from err
    except KeyboardInterrupt:
        _end(signal.SIGINT)
    except InterruptedBySignal as err:
        _end(err.number)


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    def end(number: int, _: FrameType | None) -> NoReturn:
        raise InterruptedBySignal(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def say_stopped(number: int) -> None:
    name = signal.Signals(number).name
    click.echo(f"stopped by {name}; run the same command again to go on", err=True)


def _end(number: int) -> NoReturn:
    say_stopped(number)
    raise SystemExit(128 + number) from None


def _said(err: OSError) -> str:
    """Return what an error of the operating system means, where, and what to do."""
    where = f" ({err.filename})" if err.filename else ""
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full{where}. Free some space and run the same command again: what is "
            "committed stays."
        )
    what = err.strerror or str(err) or type(err).__name__
    return (
        f"{what}{where}. Run the same command again once that is mended: what is committed stays."
    )
