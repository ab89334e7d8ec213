"""Options that say what of a corpus becomes clips; shared by `plan` and `encode-corpus`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import click

from reducio_latents.core.config import DUPLICATE_POLICIES, RESIZE_MODES

Decorated = Callable[..., Any]

OPTIONS = [
    click.option(
        "--resolution", type=int, default=256, show_default=True, metavar="PX", help="Side, in px."
    ),
    click.option(
        "--buckets",
        type=click.Choice(["square", "aspect"]),
        default="square",
        show_default=True,
        help="One square size, or the nearest of several sizes of the same area.",
    ),
    click.option("--frames", type=int, default=16, show_default=True, help="Frames of a clip."),
    click.option("--fps", type=float, default=16.0, show_default=True, help="Frames a second."),
    click.option(
        "--clips",
        "policy",
        default="all",
        show_default=True,
        metavar="POLICY",
        help="Where clips start: all, stride:SECONDS, centre, uniform:N, random:N.",
    ),
    click.option("--seed", type=int, default=0, show_default=True, help="Of --clips random:N."),
    click.option(
        "--duplicates",
        type=click.Choice(DUPLICATE_POLICIES),
        default="refer",
        show_default=True,
        help="Encode files of equal bytes once, or each.",
    ),
    click.option("--shard-rows", type=int, default=512, show_default=True, metavar="CLIPS"),
    click.option("--path-column", metavar="NAME", help="Column of a table that holds the paths."),
    click.option("--caption-column", metavar="NAME", help="The same for captions."),
    click.option("--root", metavar="DIR", help="Where a table's relative paths start from."),
    click.option("--resize", type=click.Choice(RESIZE_MODES), default="bicubic", show_default=True),
    click.option(
        "--video-backend", type=click.Choice(["pyav", "decord"]), default="pyav", show_default=True
    ),
    click.option("--workers", type=int, default=None, help="Decode processes.  [one a core]"),
]


def corpus_options(function: Decorated) -> Decorated:
    """Add the options to a command."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function


def take_clip_spec(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the clip's own options gathered under `clip`."""
    from reducio_latents.core.clips import ClipSpec

    rest = dict(settings)
    clip = ClipSpec(
        frames=rest.pop("frames"),
        rate_fps=rest.pop("fps"),
        policy=rest.pop("policy"),
        seed=rest.pop("seed"),
    )
    if rest.get("workers") is None:
        rest.pop("workers", None)
    return {**rest, "clip": clip}
