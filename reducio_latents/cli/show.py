"""How numbers look on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from reducio_latents.check.health import HealthWarning


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


def pairs(rows: Mapping[str, object]) -> None:
    """Print names and values in two columns."""
    width = max(map(len, rows), default=0)
    for name, value in rows.items():
        click.echo(f"{name:<{width}}  {value}")


def warnings(found: Iterable[HealthWarning], clips: int | None) -> None:
    """Print each warning, and below it up to `clips` of those that show it; None: all of them."""
    for warning in found:
        shown = warning.clips[:clips]
        more = len(warning.clips) - len(shown)
        click.echo(f"warning: {warning.kind}: {warning.text}")
        click.echo(f"  clips: {', '.join(shown)}" + (f" and {more} more" if more else ""))


def advance(bar: Any, what: str, done: int, total: int) -> None:
    """Move a bar of tqdm to `done` of `total`; it begins anew where `what` is another thing."""
    if bar.desc != f"{what}: ":
        bar.reset(total)
        bar.set_description(what)
    bar.update(done - bar.n)


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
        click.echo("  ".join(parts).rstrip())
