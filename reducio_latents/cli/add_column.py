"""`reducio-latents add-column`."""

from __future__ import annotations

from typing import Any

import click

from reducio_latents.cli.column_options import column_options, split_names, take_column_options


@click.command("add-column")
@click.argument("store")
@click.argument("columns", nargs=-1)
@click.option(
    "--replace",
    "replacing",
    default="",
    metavar="A,B,...",
    help="Columns to make anew with these options; all others stay as they are.",
)
@click.option(
    "--corpus",
    help="Where the videos are, if frames are needed and they have moved.  [as the store names it]",
)
@column_options
@click.option(
    "--model", default="reducio-ft4-fs32", show_default=True, metavar="NAME", help="For motion."
)
@click.option("--weights", metavar="FILE|DIR", help="Checkpoint of the model.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
    help="Of the model.",
)
@click.option("--batch-size", type=int, default=8, show_default=True, metavar="CLIPS")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--workers", type=int, default=None, help="Decode processes.  [one a core]")
@click.option(
    "--max-failed",
    type=float,
    default=0.1,
    show_default=True,
    help="Share of failed videos or clips above which the exit code is 3.",
)
def add_column(
    store: str, columns: tuple[str, ...], replacing: str, corpus: str | None, **settings: Any
) -> None:
    """Add COLUMNS to STORE, or make some anew.

    Columns: content_latent, content_clip, content_clip_pooled, text, caption, content_image,
    motion, frame_times. They are made of the stored content images and captions where these are
    exact, else of the videos. To resume, run the same command again.

    \b
    reducio-latents add-column pexels.latents content_clip text --text-model models/t5-v1_1-xxl
    reducio-latents add-column pexels.latents --replace text --text-cleaning none
    """
    from reducio_latents import encode
    from reducio_latents.cli.progress import encode_progress, print_report

    if settings.get("workers") is None:
        settings.pop("workers", None)
    options = encode.EncodeOptions(**take_column_options(settings))
    with encode_progress() as progress:
        report = encode.add_column(
            store,
            columns,
            options,
            replacing=split_names(replacing),
            corpus=corpus,
            progress=progress,
        )
    print_report(report, store)
    raise SystemExit(report.exit_code)
