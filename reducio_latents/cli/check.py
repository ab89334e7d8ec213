"""`reducio-latents check`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from reducio_latents.cli import show
from reducio_latents.cli.check_options import check_options, take_selection

PROTOCOL_NAMES = ("standard", "paper")
CLIPS_SHOWN = 5


@click.command("check")
@click.argument("store")
@click.option(
    "--report",
    type=click.Path(path_type=Path, dir_okay=False),
    default="report.html",
    show_default=True,
    metavar="FILE",
)
@check_options(num=24)
@click.option(
    "--protocol",
    type=click.Choice(PROTOCOL_NAMES),
    default="standard",
    show_default=True,
    help="How PSNR and SSIM are measured; `paper` as the published repository does.",
)
@click.option(
    "--scan",
    type=click.Choice(["all", "shown"]),
    default="all",
    show_default=True,
    help="Look for faults among all clips of the store, which reads it whole, or those shown.",
)
def check(store: str, report: Path, protocol: str, scan: str, **settings: Any) -> None:
    """Decode clips of STORE and write one HTML page about them, which opens anywhere.

    The page plays original, decoded and difference side by side, with scores, curves, statistics,
    warnings and failures.

    \b
    reducio-latents check pexels.latents --num 24 --report pexels.html --weights FILE
    """
    from tqdm import tqdm

    from reducio_latents.check.decode import DecodeOptions
    from reducio_latents.check.html import write_report
    from reducio_latents.check.report import build_report
    from reducio_latents.check.writing import make_folder
    from reducio_latents.metrics.protocol import protocol_named

    options = DecodeOptions(**take_selection(settings))
    make_folder(report.parent)  # now, as decoding may take an hour
    with tqdm(unit="clip", file=sys.stderr, delay=0.5) as bar:
        found = build_report(
            store,
            options,
            protocol=protocol_named(protocol),
            scan_all=scan == "all",
            on_clip=partial(show.advance, bar, "decode"),
            on_scan=partial(show.advance, bar, "scan"),
        )
    write_report(found, report)
    scored = [scores.psnr_db for _, scores in found.scored]
    if scored:
        mean = sum(scored) / len(scored)
        of = show.counted(len(scored), "clip")
        click.echo(f"mean PSNR {mean:.2f} dB of {of} (protocol: {protocol})")
    if found.untrained:
        click.echo(f"{found.model} has random weights: its pictures are noise")
    show.warnings(found.warnings, CLIPS_SHOWN)
    for note in found.notes:
        click.echo(note)
    click.echo(f"Wrote {report} with {show.counted(len(found.clips), 'clip')}.")
