"""`reducio-latents status`."""

from __future__ import annotations

import click

from reducio_latents.cli import show


@click.command("status")
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
    busy_s = stages.pop("gpu busy", None)
    total = sum(stages.values())
    if total:
        parts = ", ".join(f"{stage} {seconds / total:.0%}" for stage, seconds in stages.items())
        gpu = "" if busy_s is None else f"; GPU busy {busy_s / total:.0%}"
        click.echo(f"encoding took {show.duration(total)} in all: {parts}{gpu}")
    left = sum(row.clips_left for row in rows)
    click.echo("all done" if not left else "run the encode command again to go on")
