"""Options that say which clips to decode, and with what; shared by `decode` and `check`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

Decorated = Callable[..., Any]


def check_options(num: int) -> Callable[[Decorated], Decorated]:
    """Return a decorator that adds the options; `num` clips are taken by default."""
    options = [
        click.option("--ids", metavar="A,B,...", help="Clip ids, instead of a random choice."),
        click.option("--num", type=int, default=num, show_default=True, help="How many clips."),
        click.option("--seed", type=int, default=0, show_default=True, help="Of the choice."),
        click.option("--worst", is_flag=True, help="Those of the lowest recorded PSNR."),
        click.option(
            "--bucket", "buckets", multiple=True, metavar="TxHxW", help="Only of this bucket."
        ),
        click.option("--model", metavar="NAME", help="Model to decode with.  [the store's]"),
        click.option("--weights", metavar="FILE|DIR", help="Where the model's weights lie."),
        click.option(
            "--corpus", metavar="CORPUS", help="Where the originals are.  [where they were]"
        ),
        click.option("--root", metavar="DIR", help="Where a table's relative paths start from."),
        click.option(
            "--sample",
            "sample_seed",
            type=int,
            metavar="SEED",
            help="Decode a draw from the posterior, not its mean.",
        ),
        click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda:1."),
        click.option(
            "--dtype",
            type=click.Choice(["float32", "bfloat16", "float16"]),
            default="float32",
            show_default=True,
        ),
        click.option(
            "--video-backend",
            type=click.Choice(["pyav", "decord"]),
            default="pyav",
            show_default=True,
        ),
        click.option(
            "--clip-timeout-s",
            type=float,
            default=120.0,
            show_default=True,
            help="A slower decoder hung.",
        ),
    ]

    def decorate(function: Decorated) -> Decorated:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def take_selection(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with those that choose clips gathered under `selection`."""
    from reducio_latents.check.clips import Selection
    from reducio_latents.errors import ConfigError

    rest = dict(settings)
    listed = rest.pop("ids")
    ids = tuple(name.strip() for name in (listed or "").split(",") if name.strip())
    if listed is not None and not ids:
        raise ConfigError(f"--ids is {listed!r}, which names no clip; write --ids ID,ID.")
    selection = Selection(
        ids=ids,
        num=rest.pop("num"),
        seed=rest.pop("seed"),
        worst=rest.pop("worst"),
        buckets=tuple(rest.pop("buckets")),
    )
    return {**rest, "selection": selection}
