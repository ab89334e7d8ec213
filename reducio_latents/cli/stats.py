"""`reducio-latents stats`."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import click

from reducio_latents.check.options import StatsOptions
from reducio_latents.cli import show
from reducio_latents.cli.options import command, every_clip, json_instead, takes

if TYPE_CHECKING:
    from reducio_latents.check.stats import StoreStats


@command("stats")
@click.argument("store")
@takes(StatsOptions, {"Options": "look seed corpus root"})
@every_clip
@json_instead
def stats(store: str, options: StatsOptions, every_clip: bool, as_json: bool) -> None:
    """Describe the latents of STORE, channel by channel, and warn of what looks wrong.

    Warns of dead channels, collapsed posteriors, saturated float16, NaN, and of black, frozen,
    cut-through and duplicate clips, and states the threshold of each.
    """
    from reducio_latents.check.stats import store_stats

    with show.bar("clip") as advance:
        found = store_stats(store, options, partial(advance, "scan"))
    if as_json:
        click.echo(json.dumps(_as_dict(found), indent=2))
        return
    _print_channels(found)
    show.echo(show.counted(found.scan.clips, "clip"))
    show.warnings(found.warnings, every=every_clip)
    if not found.warnings:
        show.echo("no warnings")
    for note in found.notes:
        show.echo(note)


def _print_channels(found: StoreStats) -> None:
    for name, summaries in found.store.meta.statistics.items():
        column, _, bucket = name.partition("/")
        if bucket != "all":
            continue
        for what, summary in summaries.items():
            show.echo(f"{column} {what}, {len(summary['mean'])} channels")
            show.echo("  mean " + " ".join(f"{value:+.3f}" for value in summary["mean"]))
            show.echo("  std  " + " ".join(f"{value:.3f}" for value in summary["std"]))
    if len(found.scan.channel_kl):
        show.echo("KL to N(0, 1) of each channel, nats a latent value")
        show.echo("  " + " ".join(f"{value:.3f}" for value in found.scan.channel_kl))


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
