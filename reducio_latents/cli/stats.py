"""`reducio-latents stats`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from reducio_latents.cli import show

if TYPE_CHECKING:
    from reducio_latents.check.stats import StoreStats

CLIPS_SHOWN = 5


@click.command("stats")
@click.argument("store")
@click.option(
    "--look",
    type=click.IntRange(min=0),
    default=32,
    show_default=True,
    metavar="CLIPS",
    help="Originals to read again, for frozen and cut-through clips.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the choice of originals.")
@click.option("--corpus", metavar="CORPUS", help="Where the originals are.  [where they were]")
@click.option("--root", metavar="DIR", help="Where a table's relative paths start from.")
@click.option(
    "--video-backend", type=click.Choice(["pyav", "decord"]), default="pyav", show_default=True
)
@click.option(
    "--clip-timeout-s", type=float, default=120.0, show_default=True, help="A slower decoder hung."
)
@click.option("--clips", "all_clips", is_flag=True, help="Name every clip, not the first five.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def stats(store: str, all_clips: bool, as_json: bool, **settings: Any) -> None:
    """Describe the latents of STORE, channel by channel, and warn of what looks wrong.

    Warns of dead channels, collapsed posteriors, saturated float16, NaN, and of black, frozen,
    cut-through and duplicate clips, and states the threshold of each.
    """
    from tqdm import tqdm

    from reducio_latents.check.stats import StatsOptions, store_stats

    with tqdm(desc="scan", unit="clip", file=sys.stderr, delay=0.5) as bar:

        def advance(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = store_stats(store, StatsOptions(**settings), advance)
    if as_json:
        click.echo(json.dumps(_as_dict(found), indent=2, ensure_ascii=False))
        return
    _print_channels(found)
    click.echo(show.counted(found.scan.clips, "clip"))
    show.warnings(found.warnings, None if all_clips else CLIPS_SHOWN)
    if not found.warnings:
        click.echo("no warnings")
    for note in found.notes:
        click.echo(note)


def _print_channels(found: StoreStats) -> None:
    for name, summaries in found.store.meta.statistics.items():
        column, _, bucket = name.partition("/")
        if bucket != "all":
            continue
        for what, summary in summaries.items():
            click.echo(f"{column} {what}, {len(summary['mean'])} channels")
            click.echo("  mean " + " ".join(f"{value:+.3f}" for value in summary["mean"]))
            click.echo("  std  " + " ".join(f"{value:.3f}" for value in summary["std"]))
    if len(found.scan.channel_kl):
        click.echo("KL to N(0, 1) of each channel, nats a latent value")
        click.echo("  " + " ".join(f"{value:.3f}" for value in found.scan.channel_kl))


def _as_dict(found: StoreStats) -> dict[str, object]:
    return {
        "clips": found.scan.clips,
        "looked_at": found.looked,
        "channel_std": found.scan.channel_std.tolist(),
        "channel_kl_nats": found.scan.channel_kl.tolist(),
        "statistics": found.store.meta.statistics,
        "warnings": [asdict(warning) for warning in found.warnings],
        "notes": list(found.notes),
    }
