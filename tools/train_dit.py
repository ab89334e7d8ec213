#!/usr/bin/env python
"""Train a small diffusion transformer on a store of latents: python tools/train_dit.py STORE OUT"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]  # this checkout, installed or not

from dit.flow import TIMES  # noqa: E402
from dit.settings import LATENTS, PRECISIONS, RunSettings, SampleSettings, TrainSettings  # noqa: E402
from dit.train import train  # noqa: E402

from reducio_latents.errors import LatentsError  # noqa: E402

SAMPLE_OPTIONS = {
    "sample_every": "every",
    "samples": "count",
    "sample_steps": "steps",
    "guidance": "guidance",
    "weights": "weights",
}
"""Option -> its name in SampleSettings."""


@click.command(context_settings={"show_default": True, "max_content_width": 100})
@click.argument("store")
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option("--steps", type=int, default=10_000, help="Steps in all, over every start.")
@click.option("--batch-size", type=int, default=64, help="Clips a step, over all ranks.")
@click.option("--width", type=int, default=384, help="Of a token; a multiple of 16.")
@click.option("--depth", type=int, default=8, help="Transformer blocks.")
@click.option("--heads", type=int, default=6)
@click.option("--patch", type=int, default=1, help="Latents a side of a token.")
@click.option("--lr", type=float, default=1e-4)
@click.option("--warmup-steps", type=int, default=100)
@click.option("--ema-decay", type=float, default=0.999)
@click.option("--dropout", type=float, default=0.1, help="Share of clips trained unconditioned.")
@click.option("--latents", type=click.Choice(LATENTS), default="sample", help="Of posteriors.")
@click.option("--times", type=click.Choice(TIMES), default="logit-normal")
@click.option("--precision", type=click.Choice(PRECISIONS), default="fp32", help="bf16: autocast.")
@click.option("--seed", type=int, default=0)
@click.option("--columns", help="Condition on these: content_image,text.  [default: all there are]")
@click.option("--val-fraction", type=float, default=0.05, help="Share of videos held out.")
@click.option("--checkpoint-every", type=int, default=500, metavar="STEPS")
@click.option("--log-every", type=int, default=10, metavar="STEPS")
@click.option("--deterministic", is_flag=True, help="Bit-exact resume on a GPU, too; slower.")
@click.option("--sample-every", type=int, default=0, metavar="STEPS", help="0 for never.")
@click.option("--samples", type=int, default=4, help="Held-out clips to sample.")
@click.option("--sample-steps", type=int, default=50, help="Of Euler's method.")
@click.option("--guidance", type=float, default=1.5, help="1 for none.")
@click.option("--weights", help="Of the store's VAE, for samples.")
def main(store: str, out: Path, columns: str | None, **options: Any) -> None:
    """Train a small DiT on STORE by flow matching; write losses, samples, a checkpoint to OUT.

    To resume, run the same command again. Several GPUs: under torchrun.

    \b
    python tools/train_dit.py pexels.latents runs/dit --sample-every 1000 --weights FILE
    torchrun --nproc_per_node=8 tools/train_dit.py pexels.latents runs/dit --batch-size 512
    """
    named = None if columns is None else tuple(name.strip() for name in columns.split(","))
    samples = {name: options.pop(option) for option, name in SAMPLE_OPTIONS.items()}
    chosen = {f.name: options.pop(f.name) for f in fields(TrainSettings) if f.name in options}
    try:
        settings = TrainSettings(**chosen, columns=named)
        run = RunSettings(**options, samples=SampleSettings(**samples), tell=click.echo)
        train(store, out, settings, run)
    except LatentsError as err:
        raise click.ClickException(str(err)) from err


if __name__ == "__main__":
    main()
