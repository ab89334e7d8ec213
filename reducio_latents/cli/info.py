"""`reducio-latents info`."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from reducio_latents.cli import show
from reducio_latents.cli.options import command, json_instead

if TYPE_CHECKING:
    from reducio_latents.store.meta import StoreMeta


@command("info")
@click.argument("store")
@json_instead
def info(store: str, as_json: bool) -> None:
    """Describe STORE: what it holds, what made it, how large it is."""
    from reducio_latents.store import open_store
    from reducio_latents.upkeep.progress import progress_of

    opened = open_store(store)
    meta = opened.meta
    if as_json:
        click.echo(json.dumps(asdict(meta), indent=2))
        return
    clip = meta.clip
    show.pairs(
        {
            "store": f"{store} ({meta.container}, format {meta.format_version})",
            "corpus": meta.corpus,
            "a clip": f"{clip.frames} frames at {clip.rate_fps:g} fps, {clip.policy}",
            "resize": f"{meta.resize}, antialiased, to cover; centre crop",
            "shards": f"up to {meta.shard_rows} clips",
            **{
                f"{name} found": ", ".join(f"{number} {what}" for what, number in tally.items())
                for name, tally in meta.counts.items()
            },
            "versions": ", ".join(f"{name} {number}" for name, number in meta.versions.items()),
        }
    )
    rows = progress_of(opened)
    for name, column in meta.columns.items():
        mine = [row for row in rows if row.column == name]
        clips, total = sum(r.clips_done for r in mine), sum(r.bytes for r in mine)
        show.echo()
        show.pairs(
            {
                "column": f"{name}: {column.content}, {column.dtype}",
                "made by": column.encoder,
                "fingerprint": column.fingerprint[:16],
                "rows": ", ".join(
                    f"{bucket} -> {'x'.join(map(str, shape))}"
                    for bucket, shape in column.row_shapes.items()
                )
                or "of any length",
                **({"final latents": json.dumps(column.final)} if column.final else {}),
                **{
                    what.removesuffix("_db").replace("_", " "): _shown(what, error)
                    for what, error in _errors(meta, name).items()
                },
                "size": f"{show.size(total)}, {show.size(total / clips if clips else 0)} a clip",
            }
        )


def _shown(what: str, value: float) -> str:
    return f"{value:.3f} dB" if what.endswith("_db") else f"{value:.2%}"


def _errors(meta: StoreMeta, column: str) -> dict[str, float]:
    """Return what was measured of the precision and of storing in 8 bits; most are relative."""
    found = dict(meta.columns[column].measured)
    stored = meta.statistics.get(f"{column}/all", {}).get("int8_error")
    return found if stored is None else found | {"int8_error": stored["mean"][0]}
