"""`reducio-latents encode-corpus`."""

from __future__ import annotations

from typing import Any

import click

from reducio_latents.cli.column_options import column_options, split_names, take_column_options
from reducio_latents.cli.corpus_options import corpus_options, take_clip_spec
from reducio_latents.cli.numbers import NumberOr
from reducio_latents.core.config import IMAGE_CODECS


@click.command("encode-corpus")
@click.argument("corpus")
@click.argument("store")
@click.option("--model", default="reducio-ft4-fs32", show_default=True, metavar="NAME")
@click.option("--weights", metavar="FILE|DIR", help="Checkpoint of the model.")
@click.option(
    "--columns",
    default="motion,content_image,caption,frame_times",
    show_default=True,
    metavar="A,B,...",
)
@click.option(
    "--format",
    "container",
    type=click.Choice(["zarr", "webdataset"]),
    default="zarr",
    show_default=True,
)
@click.option(
    "--image-codec",
    type=click.Choice(IMAGE_CODECS),
    default="webp",
    show_default=True,
    help="How content images are kept; all but jpeg lose nothing.",
)
@column_options
@corpus_options
@click.option(
    "--batch-size",
    type=NumberOr("auto"),
    default="8",
    show_default=True,
    metavar="CLIPS|auto",
    help="auto: as many as fit in the GPU's memory.",
)
@click.option(
    "--engine",
    type=click.Choice(["local", "ray"]),
    default="local",
    show_default=True,
    help="local: this process, --gpus of them, or the ranks of torchrun or Slurm.",
)
@click.option(
    "--gpus",
    type=NumberOr("all"),
    default="1",
    show_default=True,
    metavar="N|all",
    help="Encoding processes, one for each GPU.",
)
@click.option("--ray-address", metavar="ADDRESS", help="Of a Ray cluster, auto to find it.")
@click.option(
    "--rank-timeout-s",
    type=float,
    default=300.0,
    show_default=True,
    help="A rank that is silent for so long is dead.",
)
@click.option(
    "--check-every",
    type=int,
    default=0,
    metavar="N",
    help="Decode every n-th clip on the spot and keep its PSNR.",
)
@click.option(
    "--min-psnr", type=float, metavar="DB", help="Stop when the checked clips' mean is below this."
)
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    default="float32",
    show_default=True,
)
@click.option(
    "--tiling",
    type=click.Choice(["auto", "none"]),
    default="auto",
    show_default=True,
    help="auto: tiles of 256 px for frames above 256 px.",
)
@click.option(
    "--measure-error",
    type=click.Choice(["auto", "none", "latents", "decoded"]),
    default="auto",
    show_default=True,
    help="Of a precision but float32, on one clip, kept in the store; decoded: also its PSNR.",
)
@click.option(
    "--resize-on",
    type=click.Choice(["auto", "worker", "device"]),
    default="auto",
    show_default=True,
    help="Who resizes frames: decode workers, or the encoder's device; auto: the device if a GPU.",
)
@click.option(
    "--compile",
    type=click.Choice(["none", "norms", "all"]),
    default="none",
    show_default=True,
    help="By torch.compile: all of the encoder (minutes), or its norms with activations (seconds).",
)
@click.option(
    "--clip-timeout-s", type=float, default=120.0, show_default=True, help="A slower decoder hung."
)
@click.option("--worker-memory-mb", type=int, default=4096, show_default=True, metavar="MIB")
@click.option("--read-ahead-mb", type=int, default=1024, show_default=True, metavar="MIB")
@click.option("--retry-failed", is_flag=True, help="Take up again what failed before.")
@click.option(
    "--max-failed",
    type=float,
    default=0.1,
    show_default=True,
    help="Share of failed videos or clips above which the exit code is 3.",
)
@click.option("-n", "--dry-run", is_flag=True, help="Print what would be done, and do nothing.")
def encode_corpus(corpus: str, store: str, dry_run: bool, columns: str, **settings: Any) -> None:
    """Encode the videos of CORPUS into the latent dataset STORE.

    CORPUS is a folder, a glob, a table (CSV, JSONL, Parquet) or tars of videos. To resume, or to
    add videos that came later, run the same command again.

    \b
    reducio-latents encode-corpus videos/ pexels.latents --weights reducio-ft4-fs32-attn23.ckpt
    """
    from reducio_latents import encode
    from reducio_latents.cli.progress import (
        encode_progress,
        print_report,
        print_stop,
        print_summary,
    )
    from reducio_latents.encode.stop import stop_on_signals

    settings = take_column_options(take_clip_spec(settings))
    options = encode.EncodeOptions(columns=split_names(columns), **settings)
    if dry_run:
        print_summary(encode.plan_corpus(corpus, store, options))
        return
    with encode_progress() as progress, stop_on_signals(on_stop=print_stop) as stop:
        report = encode.encode_corpus(corpus, store, options, progress=progress, stop=stop)
    print_report(report, store)
    raise SystemExit(report.exit_code)
