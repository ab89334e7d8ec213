"""`reducio-latents verify`."""

from __future__ import annotations

import click

from reducio_latents.cli import show
from reducio_latents.cli.options import command, every_clip


@command("verify")
@click.argument("store")
@every_clip
def verify(store: str, every_clip: bool) -> None:
    """Prove every byte of STORE: checksums, counts, shapes, finite values, plan and commits."""
    from reducio_latents.store import open_store
    from reducio_latents.upkeep.verify import verify as verify_store

    opened = open_store(store)
    with show.bar("commit") as advance:
        report = verify_store(opened, lambda done: advance("verify", done, None))
    for damage in report.damage:
        show.echo(f"{damage.where}: {damage.what}")
        if damage.clips:
            names = show.clips(damage.clips, every=every_clip)
            show.echo(f"  costs {len(damage.clips)} clips: {names}")
    for column, shards in report.missing.items():
        show.echo(f"{column}: {shards} shards are not done yet")
    show.echo(
        f"{show.count(report.commits)} commits, {show.count(report.rows)} rows, "
        f"{show.size(report.bytes)}: {'all sound' if report.ok else f'{len(report.damage)} faults'}"
    )
    if not report.ok:
        lost = len({clip for damage in report.damage for clip in damage.clips})
        show.echo(
            f"{lost} clips are lost. Delete the commits of the shards named above and run the "
            "encode command again: only these shards are made anew.",
            err=True,
        )
        raise SystemExit(1)
