"""`reducio-latents plan`."""

from __future__ import annotations

import click

from reducio_latents.cli.options import command, dry_run, takes
from reducio_latents.encode.options import EncodeOptions


@command("plan")
@click.argument("corpus")
@click.argument("store")
@takes(
    EncodeOptions,
    {
        "Options": """resolution buckets clip.frames clip.rate_fps clip.policy clip.seed duplicates
            shard_rows path_column caption_column root workers""",
    },
)
@dry_run
def plan(corpus: str, store: str, options: EncodeOptions, dry_run: bool) -> None:
    """Probe CORPUS and write into STORE which clips it will be made of.

    encode-corpus does this by itself; on its own it shows what would come before a GPU is paid for.
    """
    from reducio_latents import encode
    from reducio_latents.cli.progress import encode_progress, print_summary

    with encode_progress() as progress:
        summary = encode.plan_corpus(corpus, store, options, progress=progress, write=not dry_run)
    print_summary(summary)
