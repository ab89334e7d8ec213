"""`reducio-latents status`, `info`, `verify` and `stats`: what a store is and how it does."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

import click

from reducio_latents.check.options import StatsOptions
from reducio_latents.cli import show
from reducio_latents.cli.options import command, takes

if TYPE_CHECKING:
    from reducio_latents.files import Files
    from reducio_latents.store import Store
    from reducio_latents.store.meta import StoreMeta

every_clip = click.option(
    "--clips", "every_clip", is_flag=True, help="Name every clip, not the first five."
)
json_instead = click.option("--json", "as_json", is_flag=True, help="Print JSON instead.")


@command("status")
@click.argument("store")
def status(store: str) -> None:
    """Say how far STORE is: shards and clips done, left and failed, by column."""
    from reducio_latents.store import open_store
    from reducio_latents.upkeep.progress import progress_of, stage_seconds

    opened = open_store(store)
    rows = progress_of(opened)
    show.table(
        ["column", "bucket", "shards", "clips", "failed", "removed", "left", "bytes"],
        [
            [
                *[row.column, row.bucket, f"{row.shards_done}/{row.shards}"],
                *map(show.count, (row.clips_done, row.failed, row.removed, row.clips_left)),
                show.size(row.bytes),
            ]
            for row in rows
        ],
    )
    stages = stage_seconds(opened)
    total = sum(seconds for stage, seconds in stages.items() if stage != "gpu busy")
    if total:
        shares, busy = show.spent(stages, total)
        gpu = f"; {busy}" if busy else ""
        show.echo(f"encoding took {show.duration(total)} in all: {shares}{gpu}")
    left = sum(row.clips_left for row in rows)
    show.echo("all done" if not left else "run the encode command again to go on")


@command("info")
@click.argument("store")
@json_instead
def info(store: str, as_json: bool) -> None:
    """Describe STORE: what it holds, what made it, how large it is."""
    from reducio_latents.core.geometry import Bucket
    from reducio_latents.dataset.facts import summarise_facts
    from reducio_latents.store import open_store
    from reducio_latents.upkeep.progress import progress_of

    opened = open_store(store)
    meta = opened.meta
    if as_json:
        known = {name: summary._asdict() for name, summary in summarise_facts(opened).items()}
        click.echo(json.dumps({**asdict(meta), "known_of_clips": known}, indent=2))
        return
    clip = meta.clip
    frames = sorted({Bucket.parse(name).frames for name in meta.buckets}, reverse=True)
    lengths = ", ".join(map(str, frames))
    counts = {
        f"{name} found": ", ".join(f"{number} {what}" for what, number in tally.items())
        for name, tally in meta.counts.items()
    }
    show.pairs(
        {
            "store": f"{store} ({meta.container}, format {meta.format_version})",
            "corpus": meta.corpus,
            "a clip": f"{lengths} frames at {clip.rate_fps:g} fps, {clip.policy}",
            "resize": f"{meta.resize}, antialiased, to cover; centre crop",
            "interlaced frames": "left" if meta.deinterlace == "none" else meta.deinterlace,
            "colours": meta.colours,
            "shards": f"up to {meta.shard_rows} clips",
            **_about_shots(opened.files),
            **counts,
            "versions": ", ".join(f"{name} {number}" for name, number in meta.versions.items()),
        }
    )
    rows = progress_of(opened)
    for name in meta.columns:
        mine = [row for row in rows if row.column == name]
        clips, total = sum(r.clips_done for r in mine), sum(r.bytes for r in mine)
        show.echo()
        show.pairs(
            _about_column(meta, name)
            | {"size": f"{show.size(total)}, {show.size(total / clips if clips else 0)} a clip"}
        )
    _show_facts(opened)


def _show_facts(opened: Store) -> None:
    """Show the range and quantiles of what is known of clips."""
    from reducio_latents.dataset.facts import QUANTILES, summarise_facts

    facts = summarise_facts(opened)
    if not facts:
        return
    show.echo()
    shares = ["least", *(f"{share:.0%}" for share in QUANTILES[1:-1]), "most"]
    rows = [
        [name, show.count(f.known), show.count(f.missing)]
        + ([f"{v:.4g}" for v in f.quantiles] or [f"{show.count(f.texts)} texts"])
        for name, f in facts.items()
    ]
    width = max(map(len, rows))
    head = ["known of clips", "clips", "missing", *shares][:width]
    show.table(head, [[*row, *[""] * (width - len(row))] for row in rows])


def _about_shots(files: Files) -> dict[str, str]:
    """Say how many shots there are, what found them, and of how many videos they are not known."""
    from reducio_latents.store.plan import read_plan

    plan = read_plan(files)
    if plan is None or not plan.spec.shots:
        return {}
    found, *problems = plan.counts().shots.items()
    about = {"shots": f"{show.count(found[1])} found by {plan.spec.shots}"}
    for number, (why, videos) in enumerate(problems):
        about[f"shots {number}"] = f"not known of {show.counted(videos, 'video')}: {why}"
    return about


def _about_column(meta: StoreMeta, name: str) -> dict[str, str]:
    column = meta.columns[name]
    shapes = [
        f"{bucket} -> {'x'.join(map(str, shape))}" for bucket, shape in column.row_shapes.items()
    ]
    about = {
        "column": f"{name}: {column.content}, {column.dtype}",
        "made by": column.encoder,
        "fingerprint": column.fingerprint[:16],
        "rows": ", ".join(shapes) or "of any length",
    }
    if column.final:
        about["final latents"] = json.dumps(column.final)
    measured = dict(column.measured)
    if stored := meta.statistics.get(f"{name}/all", {}).get("int8_error"):
        measured["int8_error"] = stored["mean"][0]
    for what, value in measured.items():
        form = "{:.3f} dB" if what.endswith("_db") else "{:.2%}" if "error" in what else "{:g}"
        about[what.removesuffix("_db").replace("_", " ")] = form.format(value)
    return about


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
        show.echo(str(damage))
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


@command("stats")
@click.argument("store")
@takes(StatsOptions, {"Options": "filters look seed corpus root"})
@every_clip
@json_instead
def stats(store: str, options: StatsOptions, every_clip: bool, as_json: bool) -> None:
    """Describe the latents of STORE, channel by channel, and warn of what looks wrong.

    Warns of dead channels, collapsed posteriors, saturated float16, NaN, and of black, frozen,
    cut-through and duplicate clips, and states the threshold of each.
    """
    from reducio_latents.check.health import store_stats

    with show.bar("clip") as advance:
        found = store_stats(store, options, partial(advance, "scan"))
    statistics, kl = found.statistics, found.scan.channel_kl
    if as_json:
        as_dict = {
            "clips": found.scan.clips,
            "looked_at": found.looked,
            "channel_std": found.scan.channel_std.tolist(),
            "channel_kl_nats": kl.tolist(),
            "statistics": statistics,
            "warnings": [asdict(warning) for warning in found.warnings],
            "notes": list(found.notes),
        }
        click.echo(json.dumps(as_dict, indent=2))
        return
    show.channels(statistics)
    if len(kl):
        show.echo("KL to N(0, 1) of each channel, nats a latent value")
        show.echo("  " + " ".join(f"{value:.3f}" for value in kl))
    show.echo(show.counted(found.scan.clips, "clip"))
    show.warnings(found.warnings, every=every_clip)
    if not found.warnings:
        show.echo("no warnings")
    for note in found.notes:
        show.echo(note)
