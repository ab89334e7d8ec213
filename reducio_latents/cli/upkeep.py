"""`reducio-latents convert`, `remove`, `publish` and `import-checkpoint`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reducio_latents.cli import show
from reducio_latents.cli.options import command, dry_run, takes
from reducio_latents.upkeep.extraction.options import ReferenceOptions

if TYPE_CHECKING:
    from reducio_latents.core.choices import TrainerFormat


@command("convert")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@takes(
    ReferenceOptions,
    {"Options": "container", "Published extractions": "temporal_stride"},
)
@click.option("--reference", is_flag=True, help="SRC holds the published extraction's safetensors.")
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="With --reference: its T5 files.",
)
def convert_command(
    source: str, target: str, options: ReferenceOptions, reference: bool, text: Path | None
) -> None:
    """Write the store SRC to DST: as Zarr, as WebDataset tars, or as another trainer's cache.
    A Zarr store of format 1 becomes one that more readers can open.

    \b
    reducio-latents convert pexels.latents pexels-tars.latents --format webdataset
    reducio-latents convert wan.latents cache/ --format musubi
    reducio-latents convert output/ pexels.latents --reference --text output_text/

    Run the same command again to go on where it was stopped.
    """
    from reducio_latents.files import open_files
    from reducio_latents.store import open_store
    from reducio_latents.upkeep.convert import convert_store
    from reducio_latents.upkeep.extraction.importing import import_reference

    container = options.container
    if not reference and container != "zarr" and container != "webdataset":
        _export(source, target, container)
        return
    failed: dict[str, str] = {}
    with show.bar("shard") as advance:
        progress = partial(advance, "convert")
        files = open_files(target)
        if reference:
            imported = import_reference(Path(source), files, text, options, progress)
            failed, report = imported.failed, imported.stored
        else:
            report = convert_store(open_store(source), files, options.store_container(), progress)
    for name, reason in failed.items():
        show.echo(f"{name}: {reason}", err=True)
    show.echo(
        f"{show.count(report.shards)} shards, {show.count(report.commits)} commits, "
        f"{show.count(report.rows)} rows, {show.count(report.failed)} without a value, "
        f"{show.size(report.bytes)} written; every row compared."
    )
    if report.skipped:
        show.echo(f"{show.count(report.skipped)} of them were there before.")
    if failed:
        show.echo(f"{show.count(len(failed))} files are left out for the reasons above.")


def _export(source: str, target: str, name: TrainerFormat) -> None:
    from reducio_latents.files import open_files
    from reducio_latents.store import open_store
    from reducio_latents.upkeep.export import export_store
    from reducio_latents.upkeep.trainer_files import TRAINER_FILES

    with show.bar("shard") as advance:
        report = export_store(
            open_store(source), open_files(target), name, partial(advance, "convert")
        )
    for reason, clips in report.failed.items():
        show.echo(f"{show.counted(clips, 'clip')} failed: {reason}", err=True)
    show.echo(f"clips  {report}; {show.size(report.bytes)} written")
    if report.text:
        show.echo(f"text   from {', '.join(report.text)}")
    else:
        show.echo(f"text   none: {report.missing_text}; {TRAINER_FILES[name].without_text}")
    show.echo(f"lost   {report.lost}")


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


@command("import-checkpoint")
@click.argument("checkpoint")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--ema/--no-ema",
    default=None,
    help="Take the averaged or the plain weights, if the checkpoint holds both.",
)
def import_checkpoint(checkpoint: str, folder: Path, ema: bool | None) -> None:
    """Turn a published CHECKPOINT into FOLDER/model.safetensors with its config beside it.

    Nothing in the checkpoint is executed, and what only training needs is left out.

    \b
    reducio-latents import-checkpoint reducio-ft4-fs32-attn23.ckpt weights/reducio-ft4
    reducio-latents import-checkpoint hf://OWNER/NAME/FILE weights/mine
    """
    from reducio_latents.autoencoders.checkpoint import import_checkpoint as run

    found = run(checkpoint, folder, ema=ema)
    config = found.config
    show.pairs(
        {
            "temporal stride": config.temporal_stride,
            "widths": f"{config.width} video encoder, {config.content_width} content encoder, "
            f"{config.decoder_width} decoder",
            "latent channels": config.latent_channels,
            "parameters": show.count(found.parameters),
            "weights sha256": found.weights_sha256,
            "fingerprint": found.fingerprint,
            "dropped": f"{found.dropped} keys that inference does not need",
            "written": folder,
        }
    )
