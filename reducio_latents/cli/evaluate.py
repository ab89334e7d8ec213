"""`reducio-latents evaluate`."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from reducio_latents.cli import show

METRIC_NAMES = "psnr,psnr-clip,ssim,lpips-alex,lpips-vgg,fvd,flicker"


@click.command("evaluate")
@click.argument("corpora", nargs=-1, required=True, metavar="[NAME=]CORPUS...")
@click.option(
    "--model",
    "models",
    multiple=True,
    required=True,
    metavar="NAME[=WEIGHTS]",
    help="Once a model.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default="evaluation",
    show_default=True,
    metavar="DIR",
)
@click.option(
    "--preset",
    type=click.Choice(["pexels-1k", "ucf-101"]),
    help="As the paper: 1,000 videos of Pexels, or all of UCF-101; --protocol paper.",
)
@click.option("--videos", type=int, metavar="N", help="How many, drawn by --seed.  [all]")
@click.option(
    "--clips",
    "policy",
    default="centre",
    show_default=True,
    metavar="POLICY",
    help="Where clips start: all, stride:SECONDS, centre, uniform:N, random:N.",
)
@click.option("--resolution", type=int, default=256, show_default=True, metavar="PX")
@click.option("--frames", type=int, default=16, show_default=True)
@click.option("--fps", type=float, default=16.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--metrics", default=METRIC_NAMES, show_default=True, metavar="A,B,...")
@click.option(
    "--protocol",
    type=click.Choice(["standard", "paper"]),
    help="How pictures are compared.  [standard; paper with --preset]",
)
@click.option("--batch-size", type=int, default=1, show_default=True, metavar="CLIPS")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
)
@click.option(
    "--lpips-weights",
    multiple=True,
    metavar="NET=FILE",
    help="Backbone of LPIPS, alex= or vgg=, where torch.hub's folder has it not.",
)
@click.option(
    "--fvd-weights",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="I3D's: i3d_pretrained_400.pt or i3d_torchscript.pt.",
)
@click.option("--pictures", type=int, default=4, show_default=True, help="Clips that are shown.")
@click.option(
    "--video-backend", type=click.Choice(["pyav", "decord"]), default="pyav", show_default=True
)
@click.option("--workers", type=int, default=None, help="Decode processes.  [one a core]")
@click.option(
    "--clip-timeout-s", type=float, default=120.0, show_default=True, help="A slower decoder hung."
)
def evaluate(
    corpora: tuple[str, ...],
    models: tuple[str, ...],
    out: Path,
    preset: str | None,
    videos: int | None,
    workers: int | None,
    **settings: Any,
) -> None:
    """Reconstruct clips of CORPUS by several models, and print the paper's table of them.

    Models: reducio-ft4-fs32, reducio-ft2-fs32, sd21-vae, sdxl-vae, omnitokenizer, open-sora-1.2,
    cosmos-cv8x8x8 and cosmos-cv8x16x16, each with =WEIGHTS; all but Reducio's also as
    NAME:random, untrained, and Reducio as reducio-random:128; diffusers:DIR for any other; and the
    floors repeat-content and bicubic-32x. Table (Markdown, CSV, JSON), pictures and videos go to
    --out.

    \b
    reducio-latents evaluate pexels=videos/ --model reducio-ft4-fs32=ft4.ckpt \\
        --model sdxl-vae=stabilityai/sdxl-vae --model repeat-content
    """
    from tqdm import tqdm

    from reducio_latents.check import evaluate as flow
    from reducio_latents.check.sample import PRESETS, SampleSpec
    from reducio_latents.check.table import markdown, write_tables
    from reducio_latents.core.choices import usable_cores
    from reducio_latents.core.clips import ClipSpec
    from reducio_latents.metrics.protocol import protocol_named

    clip = ClipSpec(
        frames=settings.pop("frames"),
        rate_fps=settings.pop("fps"),
        policy=settings.pop("policy"),
        seed=settings.pop("seed"),
    )
    sample = SampleSpec(
        clip=clip,
        resolution=settings.pop("resolution"),
        videos=videos if videos is not None or preset is None else PRESETS[preset],
        video_backend=settings.pop("video_backend"),
        workers=usable_cores() if workers is None else workers,
        timeout_s=settings.pop("clip_timeout_s"),
    )
    protocol = settings.pop("protocol") or ("standard" if preset is None else "paper")
    options = flow.EvaluateOptions(
        models=tuple(map(flow.ModelChoice.parse, models)),
        sample=sample,
        metrics=tuple(name.strip() for name in settings.pop("metrics").split(",") if name.strip()),
        protocol=protocol_named(protocol),
        lpips_weights=_backbones(settings.pop("lpips_weights")),
        **settings,
    )
    with tqdm(unit="clip", file=sys.stderr, delay=0.5) as bar:
        told = partial(show.advance, bar)
        named = dict(flow.corpus_names(corpora))
        found = flow.evaluate(
            named,
            options,
            out,
            on_missing=partial(tqdm.write, file=sys.stderr),
            on_sample=told,
            on_clip=told,
        )
    click.echo(markdown(found))
    write_tables(found, out)
    click.echo(f"Table and pictures are in {out}.")


def _backbones(pairs: tuple[str, ...]) -> dict[str, Path]:
    from reducio_latents.errors import ConfigError

    found = {}
    for text in pairs:
        net, equals, path = text.partition("=")
        if net not in ("alex", "vgg") or not equals:
            raise ConfigError(f"--lpips-weights is {text!r}; write alex=FILE or vgg=FILE.")
        found[net] = Path(path)
    return found
