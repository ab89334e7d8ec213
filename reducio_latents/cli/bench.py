"""`reducio-latents bench`."""

from __future__ import annotations

import click

from reducio_latents.cli import show
from reducio_latents.cli.options import command, takes
from reducio_latents.encode.options import BenchOptions


@command("bench")
@click.option(
    "--corpus", metavar="CORPUS", help="Also time a whole run over these videos, as CORPUS there."
)
@takes(
    BenchOptions,
    {
        "Options": """model weights trust_config device resolution batches seconds no_compile
            psnr_loss"""
    },
)
def bench(corpus: str | None, options: BenchOptions) -> None:
    """Measure how fast clips are encoded, against a naive loop, and what fast paths cost.

    Prints a Markdown table: clips/s, ratio to the naive loop (batch 1, float32, nothing overlaps),
    share of a matmul that is measured here, relative error against float32. Frames are made up.

    \b
    reducio-latents bench --weights reducio-ft4-fs32-attn23.ckpt --model reducio-ft4-fs32
    """
    import torch

    from reducio_latents.encode.bench import (
        HEADER,
        NAIVE,
        VARIANTS,
        EncoderBench,
        matmul_flops,
        table_row,
    )

    run = options.encoding
    where = torch.device(run.torch_device)
    measured = EncoderBench(
        model=options.model,
        weights=options.weights,
        trust_config=options.trust_config,
        device=where,
        bucket=run.bucket_list(multiple=1)[0],
        batches=options.batches,
        variants=[v for v in VARIANTS if v.compile == "none" or not options.no_compile],
        seconds=options.seconds,
        decode=options.psnr_loss,
    )
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    matmul = matmul_flops(where, dtype, min(2.0, options.seconds))
    show.echo(
        f"torch {torch.__version__}, {where}, {str(dtype)[6:]} matmul {matmul / 1e12:.3g} TFLOP/s"
    )
    show.echo()
    show.echo(HEADER.partition("\n")[0])
    show.echo(HEADER.partition("\n")[2])
    naive = 0.0
    for found in measured.run():
        naive = found.clips_per_s if found.variant is NAIVE else naive
        show.echo(table_row(found, naive, matmul))
    if corpus is not None:
        from reducio_latents.encode.bench_corpus import compare_runs

        show.echo()
        show.echo(compare_runs(corpus, run))
