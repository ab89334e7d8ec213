"""`reducio-latents add-column`."""

from __future__ import annotations

import click

from reducio_latents.cli.encode_corpus import MODELS
from reducio_latents.cli.options import Value, command, takes
from reducio_latents.encode.options import EncodeOptions


@command("add-column")
@click.argument("store")
@click.argument("columns", nargs=-1)
@click.option(
    "--replace",
    "replacing",
    type=Value(tuple[str, ...]),
    metavar="A,B,...",
    help="Columns to make anew with these options; all others stay as they are.",
)
@click.option("--corpus", help="Where the videos are, if frames are needed and they have moved.")
@takes(
    EncodeOptions,
    {
        "Options": "model weights dtype batch_size device workers zstd max_failed",
        "Models": MODELS,
    },
)
def add_column(
    store: str,
    columns: tuple[str, ...],
    replacing: tuple[str, ...] | None,
    corpus: str | None,
    options: EncodeOptions,
) -> None:
    """Add COLUMNS to STORE, or make some anew.

    Columns: content_latent, content_clip, content_clip_pooled, text, caption, content_image,
    motion, frame_times. They are made of the stored content images and captions if these are exact,
    else of the videos. To resume, run the same command again.

    \b
    reducio-latents add-column pexels.latents content_clip text --text-model models/t5-v1_1-xxl
    reducio-latents add-column pexels.latents --replace text --text-cleaning none
    """
    from reducio_latents import encode
    from reducio_latents.cli.progress import encode_progress, print_report

    with encode_progress() as progress:
        report = encode.add_column(
            store, columns, options, replacing=replacing or (), corpus=corpus, progress=progress
        )
    print_report(report, store)
    raise SystemExit(report.exit_code)
