"""`reducio-latents decode`, `check` and `evaluate`: clips, beside what models made of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reducio_latents.check.options import CheckOptions, DecodeOptions, EvaluateOptions
from reducio_latents.cli import show
from reducio_latents.cli.options import command, takes

if TYPE_CHECKING:
    from reducio_latents.check.decode import DecodeResult

LOOKED_AT = """selection.ids selection.num selection.seed selection.sort selection.worst
    selection.filters selection.buckets
    model weights corpus root sample_seed device dtype"""
REPORT = "report.html"


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

    Clips are chosen at random with --num and --seed, by --ids, or by --sort: a score, a column of
    the corpus' table, psnr. The model is the one that the store names; any other is refused.

    \b
    reducio-latents decode pexels.latents --num 8 --out checks/ --weights reducio-ft4-fs32.ckpt
    """
    from reducio_latents.check.decode import JOINED, SHEET, decode_store, mean_psnr

    results = decode_store(store, out, options, on_clip=partial(_say, set()))
    compared = sum(result.psnr_db is not None for result in results)
    _say_mean(mean_psnr(results), compared, "standard")
    if compared < len(results):
        left = f"{len(results) - compared} of {show.counted(len(results), 'clip')}"
        show.echo(f"no original to compare with: {left}")
    stills = sum(result.clip.bucket.frames == 1 for result in results)
    wrote = [show.counted(stills, "picture")] if stills else []
    if videos := len(results) - stills:
        wrote = [show.counted(videos, "video"), *wrote, f"{JOINED}.{options.format} of all videos"]
    show.echo(f"Wrote {', '.join(wrote)}, and {SHEET} into {out}.")


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


def _say_mean(psnr_db: float, clips: int, protocol: str) -> None:
    if clips:
        of = show.counted(clips, "clip")
        show.echo(f"mean PSNR {psnr_db:.2f} dB of {of} (protocol: {protocol})")


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
    reducio-latents check pexels.latents --sort motion --filters "brightness > 20"
    """
    from reducio_latents.check.html import write_report
    from reducio_latents.check.pictures import make_folder
    from reducio_latents.check.report import build_report

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
    _say_mean(sum(scored) / max(1, len(scored)), len(scored), options.protocol)
    if found.untrained:
        show.echo(f"{found.model} has random weights: its pictures are noise")
    show.warnings(found.warnings)
    for note in found.notes:
        show.echo(note)
    show.echo(f"Wrote {path} with {show.counted(len(found.clips), 'clip')}.")


OUT = "evaluation"


@command("evaluate")
@click.argument("corpora", nargs=-1, required=True, metavar="[NAME=]CORPUS...")
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help=f"Where table, pictures and videos go.  [{OUT}]",
)
@takes(
    EvaluateOptions,
    {
        "Options": """models preset metrics protocol device dtype batch_size lpips_weights
            fvd_weights pictures trust_config""",
        "Which clips": """sample.videos sample.clip.policy sample.clip.seed sample.resolution
            sample.clip.frames sample.clip.rate_fps sample.workers""",
    },
)
def evaluate(corpora: tuple[str, ...], out: Path | None, options: EvaluateOptions) -> None:
    """Reconstruct clips of CORPUS by several models, and print the paper's table of them.

    Models: reducio-ft4-fs32, reducio-ft2-fs32; sd21-vae, sdxl-vae, omnitokenizer, open-sora-1.2,
    cosmos-cv8x8x8 and cosmos-cv8x16x16, each with =WEIGHTS, a path or
    hf://OWNER/NAME[/FILE]; all but Reducio's also as NAME:random, untrained, and Reducio as
    reducio-random:128; diffusers:DIR for any other; and the floors repeat-content and bicubic-32x.
    Table (Markdown, CSV, JSON), pictures and videos go to --out.

    \b
    reducio-latents evaluate pexels=videos/ --model reducio-ft4-fs32 \\
        --model sdxl-vae=stabilityai/sdxl-vae --model repeat-content
    """
    from reducio_latents.check import evaluate as flow
    from reducio_latents.check.table import markdown, write_tables

    folder = out or Path(OUT)
    with show.bar("clip") as advance:
        found = flow.evaluate(
            dict(flow.corpus_names(corpora)),
            options,
            folder,
            on_missing=partial(show.echo, err=True),
            on_sample=advance,
            on_clip=advance,
        )
    for line in markdown(found).split("\n"):
        show.echo(line)
    write_tables(found, folder)
    show.echo(f"Table and pictures are in {folder}.")
