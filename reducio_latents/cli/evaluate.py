"""`reducio-latents evaluate`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from reducio_latents.check.options import EvaluateOptions
from reducio_latents.cli import show
from reducio_latents.cli.options import command, takes

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
