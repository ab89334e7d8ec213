"""`reducio-latents publish`."""

from __future__ import annotations

import click

from reducio_latents.cli import show
from reducio_latents.cli.options import command


@command("publish")
@click.argument("store")
@click.argument("url", metavar="hf://datasets/USER/NAME")
@click.option(
    "--licence",
    "--license",
    metavar="ID",
    help="Of the latents, by the Hub's name of it: cc-by-4.0, other.",
)
@click.option("--private", is_flag=True, help="Make the data set one that only you can see.")
@click.option("-n", "--dry-run", is_flag=True, help="Write all of it, for a look; upload nothing.")
def publish(store: str, url: str, licence: str | None, private: bool, dry_run: bool) -> None:
    """Upload STORE to the Hugging Face Hub, with a card and a preview for its viewer.

    \b
    reducio-latents publish pexels.latents hf://datasets/me/pexels-latents --licence cc-by-4.0

    Paths of this machine are left out: where the corpus and the weights lay, and what runs left. If
    it breaks off, or the store has changed, run the same command again.
    """
    from reducio_latents.store import open_store
    from reducio_latents.upkeep.publish import publish_store

    with show.bar("file") as advance:
        report = publish_store(
            open_store(store),
            url,
            licence=licence,
            private=private,
            dry_run=dry_run,
            progress=lambda what, done: advance(what, done, None),
        )
    what = f"{show.counted(report.files, 'file')}, {show.size(report.bytes)}"
    what += f", {show.counted(report.pictures, 'picture')} in the preview"
    if dry_run:
        show.echo(f"{what}: ready in {report.folder}; nothing was uploaded")
        return
    show.echo(f"{what}: uploaded to https://huggingface.co/datasets/{report.repository}")
    if report.deleted:
        show.echo(f"{show.counted(report.deleted, 'file')} of an earlier upload deleted there")
