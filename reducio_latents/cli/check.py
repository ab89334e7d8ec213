"""`reducio-latents check`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from reducio_latents.check.options import CheckOptions
from reducio_latents.cli import show
from reducio_latents.cli.options import command, takes

LOOKED_AT = """selection.ids selection.num selection.seed selection.worst selection.buckets
    model weights corpus root sample_seed device dtype"""
REPORT = "report.html"


@command("check")
@click.argument("store")
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help=f"The page.  [{REPORT}]",
)
@takes(CheckOptions, {"Options": f"{LOOKED_AT} protocol scan"})
def check(store: str, report: Path | None, options: CheckOptions) -> None:
    """Decode clips of STORE and write one HTML page about them, which opens anywhere.

    The page plays original, decoded and difference side by side, with scores, curves, statistics,
    warnings and failures.

    \b
    reducio-latents check pexels.latents --num 24 --report pexels.html --weights FILE
    """
    from reducio_latents.check.html import write_report
    from reducio_latents.check.report import build_report
    from reducio_latents.check.writing import make_folder

    path = report or Path(REPORT)
    make_folder(path.parent)  # now, as decoding may take an hour
    with show.bar("clip") as advance:
        found = build_report(
            store,
            options,
            on_clip=partial(advance, "decode"),
            on_scan=partial(advance, "scan"),
        )
    write_report(found, path)
    scored = [scores.psnr_db for _, scores in found.scored]
    if scored:
        mean = sum(scored) / len(scored)
        of = show.counted(len(scored), "clip")
        show.echo(f"mean PSNR {mean:.2f} dB of {of} (protocol: {options.protocol})")
    if found.untrained:
        show.echo(f"{found.model} has random weights: its pictures are noise")
    show.warnings(found.warnings)
    for note in found.notes:
        show.echo(note)
    show.echo(f"Wrote {path} with {show.counted(len(found.clips), 'clip')}.")
