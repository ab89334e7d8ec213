"""`reducio-latents bench`."""

from __future__ import annotations

import click

SIZES = "8,16,32"


@click.command()
@click.option("--model", default="reducio-random:128", show_default=True, metavar="NAME")
@click.option("--weights", metavar="FILE|DIR", help="Checkpoint of the model.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:1, ...")
@click.option(
    "--resolution", type=int, default=256, show_default=True, metavar="PX", help="Side, in px."
)
@click.option("--frames", type=int, default=16, show_default=True, help="Frames of a clip.")
@click.option(
    "--batches", default=SIZES, show_default=True, metavar="N,N,...", help="Sizes to try."
)
@click.option(
    "--seconds", type=float, default=5.0, show_default=True, help="Of each measurement, about."
)
@click.option("--compile/--no-compile", default=True, help="With torch.compile too, or not.")
@click.option("--psnr-loss", is_flag=True, help="Decode too: what fast paths cost in dB.")
@click.option(
    "--corpus", metavar="CORPUS", help="Also time a whole run over these videos, as CORPUS there."
)
def bench(
    model: str,
    weights: str | None,
    device: str,
    resolution: int,
    frames: int,
    batches: str,
    seconds: float,
    compile: bool,
    psnr_loss: bool,
    corpus: str | None,
) -> None:
    """Measure how fast clips are encoded, against a naive loop, and what fast paths cost.

    Prints a Markdown table: clips/s, ratio to the naive loop (batch 1, float32, nothing overlaps),
    share of a matmul that is measured here, relative error against float32. Frames are made up.

    \b
    reducio-latents bench --weights reducio-ft4-fs32-attn23.ckpt --model reducio-ft4-fs32
    """
    import torch

    from reducio_latents.core.geometry import square_bucket
    from reducio_latents.encode import EncodeOptions
    from reducio_latents.encode.bench import (
        HEADER,
        NAIVE,
        VARIANTS,
        EncoderBench,
        matmul_flops,
        table_row,
    )

    options = EncodeOptions(
        model=model, weights=weights, device=device, resolution=resolution, batch_size=1
    )
    where = torch.device(options.torch_device)
    measured = EncoderBench(
        model=model,
        weights=weights,
        device=where,
        bucket=square_bucket(frames, resolution),
        batches=split_sizes(batches),
        variants=[v for v in VARIANTS if compile or v.compile == "none"],
        seconds=seconds,
        decode=psnr_loss,
    )
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    matmul = matmul_flops(where, dtype, min(2.0, seconds))
    click.echo(
        f"torch {torch.__version__}, {where}, {str(dtype)[6:]} matmul {matmul / 1e12:.3g} TFLOP/s\n"
    )
    click.echo(HEADER)
    naive = 0.0
    for found in measured.run():
        naive = found.clips_per_s if found.variant is NAIVE else naive
        click.echo(table_row(found, naive, matmul))
    if corpus is not None:
        from reducio_latents.encode.bench_corpus import compare_runs

        click.echo(f"\n{compare_runs(corpus, options)}")


def split_sizes(text: str) -> tuple[int, ...]:
    """Read `8,16,32`; raise a usage error for anything but numbers from 1."""
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise click.BadParameter(f"{text!r} is not a list of numbers from 1, as {SIZES}.")
    return sizes
