"""`reducio-latents verify`."""

from __future__ import annotations

import sys

import click

from reducio_latents.cli import show

CLIPS_SHOWN = 5


@click.command("verify")
@click.argument("store")
@click.option("--clips", is_flag=True, help="Name every clip that is lost, not the first five.")
def verify(store: str, clips: bool) -> None:
    """Prove every byte of STORE: checksums, counts, shapes, finite values, plan and commits."""
    from tqdm import tqdm

    from reducio_latents.store import open_store
    from reducio_latents.upkeep.verify import verify as verify_store

    opened = open_store(store)
    with tqdm(desc="verify", unit="commit", file=sys.stderr) as bar:

        def tell(done: int) -> None:
            bar.update(done - bar.n)

        report = verify_store(opened, tell)
    for damage in report.damage:
        click.echo(f"{damage.where}: {damage.what}")
        if damage.clips:
            shown = damage.clips if clips else damage.clips[:CLIPS_SHOWN]
            more = len(damage.clips) - len(shown)
            names = ", ".join(shown) + (f" and {more} more" if more else "")
            click.echo(f"  costs {len(damage.clips)} clips: {names}")
    for column, shards in report.missing.items():
        click.echo(f"{column}: {shards} shards are not done yet")
    click.echo(
        f"{show.count(report.commits)} commits, {show.count(report.rows)} rows, "
        f"{show.size(report.bytes)}: {'all sound' if report.ok else f'{len(report.damage)} faults'}"
    )
    if not report.ok:
        lost = len({clip for damage in report.damage for clip in damage.clips})
        click.echo(
            f"{lost} clips are lost. Delete the commits of the shards named above and run the "
            "encode command again: only these shards are made anew.",
            err=True,
        )
        raise SystemExit(1)
