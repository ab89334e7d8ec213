"""`reducio-latents remove`."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from reducio_latents.cli import show
from reducio_latents.cli.options import command, dry_run


@command("remove")
@click.argument("store")
@click.option(
    "--video",
    "videos",
    multiple=True,
    metavar="NAME",
    help="A video as the plan names it; may be given several times.",
)
@click.option(
    "--clip-ids",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Ids of clips, one a line, or Parquet with a column clip_id.",
)
@dry_run
def remove(store: str, videos: tuple[str, ...], clip_ids: Path | None, dry_run: bool) -> None:
    """Take clips out of STORE for good: their bytes, captions, and what was measured of them.

    Videos with the same bytes go with a video. What was removed stays out: encode-corpus does not
    make it again, also if the corpus has it still. No run may write to STORE meanwhile. If it is
    killed, run the same command again.

    \b
    reducio-latents remove pexels.latents --video folder/name.mp4 --dry-run
    reducio-latents remove pexels.latents --clip-ids takedown.txt
    """
    from reducio_latents.upkeep.remove import remove_clips

    if not videos and clip_ids is None:
        raise click.UsageError("name what is to be removed: --video NAME or --clip-ids FILE.")
    with show.bar("shard") as advance:
        report = remove_clips(
            store, videos, clip_ids or (), dry_run=dry_run, progress=partial(advance, "remove")
        )
    losses = [f"{name} ({show.counted(clips, 'clip')})" for name, clips in report.videos.items()]
    for loss in losses if dry_run else ():
        show.echo(f"would go: {loss}")
    show.echo(
        f"{show.counted(report.clips, 'clip')} of {show.counted(len(losses), 'video')} "
        f"{'would be' if dry_run else 'were'} removed; {show.counted(report.files, 'file')} "
        f"({show.size(report.bytes)}) of {show.counted(report.shards, 'shard')} written anew"
    )
    if report.before:
        show.echo(f"{show.counted(report.before, 'clip')} had been removed before")
