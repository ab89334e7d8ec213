"""`reducio-latents decode`."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from reducio_latents.cli import show
from reducio_latents.cli.check_options import check_options, take_selection

if TYPE_CHECKING:
    from reducio_latents.check.decode import DecodeResult


@click.command("decode")
@click.argument("store")
@click.option(
    "--out", type=click.Path(path_type=Path, file_okay=False), required=True, metavar="DIR"
)
@click.option(
    "--format",
    type=click.Choice(["mp4", "webp"]),
    default="mp4",
    show_default=True,
    help="webp: animated pictures.",
)
@check_options(num=8)
def decode(store: str, out: Path, **settings: Any) -> None:
    """Decode clips of STORE into DIR beside their originals: videos, and one contact sheet.

    Clips are chosen at random with --num and --seed, by --ids, or by --worst recorded PSNR. The
    model is the one that the store names; any other is refused.

    \b
    reducio-latents decode pexels.latents --num 8 --out checks/ --weights reducio-ft4-fs32.ckpt
    """
    from reducio_latents.check.decode import JOINED, SHEET, DecodeOptions, decode_store, mean_psnr

    options = DecodeOptions(**take_selection(settings))
    results = decode_store(store, out, options, on_clip=partial(_say, set()))
    mean = mean_psnr(results)
    compared = sum(result.psnr_db is not None for result in results)
    if not math.isnan(mean):
        of = show.counted(compared, "clip")
        click.echo(f"mean PSNR {mean:.2f} dB of {of} (protocol: standard)")
    if compared < len(results):
        left = f"{len(results) - compared} of {show.counted(len(results), 'clip')}"
        click.echo(f"no original to compare with: {left}")
    joined = f"{JOINED}.{options.format}"
    videos = show.counted(len(results), "video")
    click.echo(f"Wrote {videos}, {joined} of all, and {SHEET} into {out}.")


def _say(told: set[str | None], result: DecodeResult) -> None:
    """Print a clip's line; a reason that is among `told` was read already, and is left out."""
    clip = result.clip
    where = f"{clip.clip_id}  {clip.video} at {clip.start_s:g} s"
    if result.psnr_db is not None:
        click.echo(f"{where}  PSNR {result.psnr_db:.2f} dB")
    else:
        why = "" if result.problem in told else f": {result.problem}"
        told.add(result.problem)
        click.echo(f"{where}  no original{why}")
