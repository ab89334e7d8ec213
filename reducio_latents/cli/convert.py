"""`reducio-latents convert`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import click

from reducio_latents.cli import show


@click.command("convert")
@click.argument("source", metavar="SRC")
@click.argument("target", metavar="DST")
@click.option(
    "--format",
    "container",
    type=click.Choice(["zarr", "webdataset"]),
    default="zarr",
    show_default=True,
    help="What DST is to be.",
)
@click.option("--reference", is_flag=True, help="SRC holds the published extraction's safetensors.")
@click.option(
    "--text",
    type=click.Path(path_type=Path),
    metavar="FOLDER",
    help="With --reference: its T5 files.",
)
@click.option(
    "--temporal-stride",
    type=click.Choice(["4", "2"]),
    default="4",
    show_default=True,
    help="With --reference: of the model that made the latents.",
)
@click.option("--shard-rows", type=int, default=512, show_default=True, help="With --reference.")
def convert(
    source: str,
    target: str,
    container: str,
    reference: bool,
    text: Path | None,
    temporal_stride: str,
    shard_rows: int,
) -> None:
    """Write the store SRC to DST as Zarr or as WebDataset tars, every row compared.

    \b
    reducio-latents convert pexels.latents pexels-tars.latents --format webdataset
    reducio-latents convert output/ pexels.latents --reference --text output_text/

    Run the same command again to go on where it was stopped.
    """
    from tqdm import tqdm

    from reducio_latents.files import open_files
    from reducio_latents.store import open_store
    from reducio_latents.upkeep.convert import convert_store
    from reducio_latents.upkeep.extraction.importing import ReferenceOptions, import_reference

    kind: Literal["zarr", "webdataset"] = "webdataset" if container == "webdataset" else "zarr"
    failed: dict[str, str] = {}
    with tqdm(desc="convert", unit="shard", file=sys.stderr) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        if reference:
            options = ReferenceOptions(
                container=kind, shard_rows=shard_rows, temporal_stride=int(temporal_stride)
            )
            imported = import_reference(Path(source), open_files(target), text, options, progress)
            failed, report = imported.failed, imported.stored
        else:
            report = convert_store(open_store(source), open_files(target), kind, progress)
    for name, reason in failed.items():
        click.echo(f"{name}: {reason}", err=True)
    click.echo(
        f"{show.count(report.shards)} shards, {show.count(report.commits)} commits, "
        f"{show.count(report.rows)} rows, {show.count(report.failed)} without a value, "
        f"{show.size(report.bytes)} written; every row compared."
    )
    if report.skipped:
        click.echo(f"{show.count(report.skipped)} of them were there before.")
    if failed:
        click.echo(f"{show.count(len(failed))} files are left out for the reasons above.")
