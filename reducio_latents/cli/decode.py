"""`reducio-latents decode`."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reducio_latents.check.options import DecodeOptions
from reducio_latents.cli import show
from reducio_latents.cli.check import LOOKED_AT
from reducio_latents.cli.options import command, takes

if TYPE_CHECKING:
    from reducio_latents.check.decode import DecodeResult


@command("decode")
@click.argument("store")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    metavar="DIR",
    help="Where videos and contact sheet go.",
)
@takes(DecodeOptions, {"Options": f"format {LOOKED_AT}"})
def decode(store: str, out: Path, options: DecodeOptions) -> None:
    """Decode clips of STORE into DIR beside their originals: videos, and one contact sheet.

    Clips are chosen at random with --num and --seed, by --ids, or by --worst recorded PSNR. The
    model is the one that the store names; any other is refused.

    \b
    reducio-latents decode pexels.latents --num 8 --out checks/ --weights reducio-ft4-fs32.ckpt
    """
    from reducio_latents.check.decode import JOINED, SHEET, decode_store, mean_psnr

    results = decode_store(store, out, options, on_clip=partial(_say, set()))
    mean = mean_psnr(results)
    compared = sum(result.psnr_db is not None for result in results)
    if not math.isnan(mean):
        of = show.counted(compared, "clip")
        show.echo(f"mean PSNR {mean:.2f} dB of {of} (protocol: standard)")
    if compared < len(results):
        left = f"{len(results) - compared} of {show.counted(len(results), 'clip')}"
        show.echo(f"no original to compare with: {left}")
    joined = f"{JOINED}.{options.format}"
    videos = show.counted(len(results), "video")
    show.echo(f"Wrote {videos}, {joined} of all, and {SHEET} into {out}.")


def _say(told: set[str | None], result: DecodeResult) -> None:
    """Print a clip's line; a reason that is among `told` was read already, and is left out."""
    clip = result.clip
    where = f"{clip.clip_id}  {clip.video} at {clip.start_s:g} s"
    if result.psnr_db is not None:
        show.echo(f"{where}  PSNR {result.psnr_db:.2f} dB")
    else:
        why = "" if result.problem in told else f": {result.problem}"
        told.add(result.problem)
        show.echo(f"{where}  no original{why}")
