"""`reducio-latents status`."""

from __future__ import annotations

import click

from reducio_latents.cli import show
from reducio_latents.cli.options import command


@command("status")
@click.argument("store")
def status(store: str) -> None:
    """Say how far STORE is: shards and clips done, left and failed, by column."""
    from reducio_latents.store import open_store
    from reducio_latents.upkeep.progress import progress_of, stage_seconds

    opened = open_store(store)
    rows = progress_of(opened)
    show.table(
        ["column", "bucket", "shards", "clips", "failed", "left", "bytes"],
        (
            [
                row.column,
                row.bucket,
                f"{row.shards_done}/{row.shards}",
                show.count(row.clips_done),
                show.count(row.failed),
                show.count(row.clips_left),
                show.size(row.bytes),
            ]
            for row in rows
        ),
    )
    stages = stage_seconds(opened)
    total = sum(seconds for stage, seconds in stages.items() if stage != "gpu busy")
    if total:
        shares, busy = show.spent(stages, total)
        gpu = f"; {busy}" if busy else ""
        show.echo(f"encoding took {show.duration(total)} in all: {shares}{gpu}")
    left = sum(row.clips_left for row in rows)
    show.echo("all done" if not left else "run the encode command again to go on")
