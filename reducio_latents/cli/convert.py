"""`reducio-latents convert`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from reducio_latents.cli import show
from reducio_latents.cli.options import command, takes
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
