"""What the commands print: text with control characters written out, numbers, tables, bars; and how
they end when something outside ends them: one line, and an exit code that says what."""

from __future__ import annotations

import errno
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, NoReturn

import click

from reducio_latents.core.signals import handling
from reducio_latents.core.text import print_logs_safely, printable, without_secrets
from reducio_latents.errors import LatentsError, TrainingError

if TYPE_CHECKING:
    from types import FrameType

    from reducio_latents.check.health import HealthWarning

CLIPS_SHOWN = 5
"""Clips that a finding names, if not all are asked for."""
MOST_CHANNELS = 64
"""More channels than this are not shown one by one."""
Advance = Callable[[str, int, int | None], None]
"""Takes what is done, how much of it, and out of how much."""


def safe(text: object) -> str:
    """Return text from elsewhere so that nothing in it moves a terminal or is a secret."""
    return printable(without_secrets(str(text)))


def echo(text: object = "", *, err: bool = False) -> None:
    """Print a line."""
    click.echo(safe(text), err=err)


def count(number: int) -> str:
    return f"{number:,}"


def counted(number: int, what: str) -> str:
    """1 -> 1 clip; 24 -> 24 clips."""
    return f"{count(number)} {what}" + ("" if number == 1 else "s")


def size(number: float) -> str:
    """Bytes with a binary unit: 1536 -> 1.5 KiB."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(number) < 1024 or unit == "TiB":
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1024
    raise AssertionError


def duration(seconds: float) -> str:
    """90 -> 1 min 30 s."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def spent(stages: Mapping[str, float], seconds: float) -> tuple[str, str]:
    """Return what share of the time each stage took, and how busy the GPU was in `seconds`."""
    busy_s = stages.get("gpu busy")
    took = {stage: s for stage, s in stages.items() if stage != "gpu busy"}
    total = sum(took.values())
    shares = ", ".join(f"{stage} {s / total:.0%}" for stage, s in took.items()) if total else ""
    return shares, "" if busy_s is None or not seconds else f"GPU busy {busy_s / seconds:.0%}"


def pairs(rows: Mapping[str, object]) -> None:
    """Print names and values in two columns."""
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        echo(f"{name:<{width}}  {value}")


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    """Print rows under a head, columns aligned, numbers to the right."""
    cells = [[str(c) for c in row] for row in rows]
    names = list(head)
    widths = [max(len(r[i]) for r in [names, *cells]) for i in range(len(names))]
    for row in [names, *cells]:
        parts = [
            cell.rjust(width) if cell[:1].isdigit() or cell[:1] == "-" else cell.ljust(width)
            for cell, width in zip(row, widths, strict=True)
        ]
        echo("  ".join(parts).rstrip())


def channels(statistics: Mapping[str, Mapping[str, Mapping[str, list[float]]]]) -> None:
    """Print mean and std of every channel of each column, or of very many their range."""
    for name, summary in statistics.items():
        column, _, bucket = name.partition("/")
        for what, values in summary.items() if bucket == "all" else ():
            echo(f"{column} {what}, {count(len(values['mean']))} channels")
            for kind in ("mean", "std"):
                shown = [f"{value:+.4f}" for value in values[kind]]
                if len(shown) > MOST_CHANNELS:
                    shown = [f"{min(values[kind]):+.4f} to {max(values[kind]):+.4f}"]
                echo(f"  {kind:<4} {' '.join(shown)}")


def clips(names: Sequence[str], *, every: bool = False) -> str:
    """Return the names of clips, all or the first ones."""
    shown = names if every else names[:CLIPS_SHOWN]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "")


def warnings(found: Iterable[HealthWarning], *, every: bool = False) -> None:
    """Print each warning, and below it the clips that show it."""
    for warning in found:
        echo(f"warning: {warning.kind}: {warning.text}")
        echo(f"  clips: {clips(warning.clips, every=every)}")


@contextmanager
def bar(unit: str) -> Iterator[Advance]:
    """Show a bar while the block runs; it begins anew when something else is done."""
    from tqdm import tqdm

    with tqdm(unit=unit, file=sys.stderr, delay=0.5, dynamic_ncols=True) as shown:

        def advance(what: str, done: int, total: int | None) -> None:
            if shown.desc != f"{safe(what)}: ":
                shown.reset(total)
                shown.set_description(safe(what))
            shown.update(done - shown.n)

        yield advance


class InterruptedBySignal(BaseException):
    """A signal asked the command to end, and nothing is in hand that must be finished first."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def one_line() -> Iterator[None]:
    """Turn whatever ends the block into one line on stderr and an exit code, without a traceback.

    SIGTERM and SIGHUP end it as Ctrl-C does, unless the block listens to it itself.
    """
    print_logs_safely()
    try:
        with _signals_raise():
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
def _signals_raise() -> Iterator[None]:
    def end(number: int, _: FrameType | None) -> NoReturn:
        if number == signal.SIGHUP:  # the shell may say the same
            signal.signal(number, signal.SIG_IGN)
        raise InterruptedBySignal(number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with handling(end, [signal.SIGTERM, signal.SIGHUP]):
        yield


def say_stopped(number: int) -> None:
    name = signal.Signals(number).name
    with suppress(OSError):  # the terminal may be gone
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
