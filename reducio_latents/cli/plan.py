"""`reducio-latents plan`."""

from __future__ import annotations

from typing import Any

import click

from reducio_latents.cli.corpus_options import corpus_options, take_clip_spec


@click.command("plan")
@click.argument("corpus")
@click.argument("store")
@corpus_options
@click.option("-n", "--dry-run", is_flag=True, help="Print the plan's sums, and write nothing.")
def plan(corpus: str, store: str, dry_run: bool, **settings: Any) -> None:
    """Probe CORPUS and write into STORE which clips it will be made of.

    encode-corpus does this by itself; on its own it shows what would come before a GPU is paid for.
    """
    from reducio_latents import encode
    from reducio_latents.cli.progress import encode_progress, print_summary

    options = encode.EncodeOptions(**take_clip_spec(settings))
    with encode_progress() as progress:
        summary = encode.plan_corpus(corpus, store, options, progress=progress, write=not dry_run)
    print_summary(summary)
