"""`reducio-latents encode-corpus`, `plan`, `add-column` and `bench`."""

from __future__ import annotations

import click

from reducio_latents.cli import show
from reducio_latents.cli.options import Value, command, dry_run, takes
from reducio_latents.encode.options import BenchOptions, EncodeOptions

OTHER_MODELS = """scorer content_latent.model content_latent.dtype
    content_clip.model content_clip.dtype content_clip.resize content_clip.quantization
    text.model text.preset text.template text.layer text.cleaning text.max_tokens
    text.dtype text.values"""


@command("encode-corpus")
@click.argument("corpus")
@click.argument("store")
@takes(
    EncodeOptions,
    {
        "Options": """model weights columns resolution clip.policy shots dtype batch_size compile
            device gpus workers retry_failed""",
        "Corpus and clips": """buckets clip.frames clip.rate_fps clip.seed duplicates
            update_captions path_column caption_column start_column end_column root label
            video_backend""",
        "Store": "container image_codec resize deinterlace colours tiling shard_rows zstd",
        "Other columns": f"trust_config {OTHER_MODELS}",
        "Failures and checks": "max_failed clip_timeout_s check_every min_psnr",
        "Several machines": "engine ray_address rank_timeout_s",
    },
)
@dry_run
def encode_corpus(corpus: str, store: str, options: EncodeOptions, dry_run: bool) -> None:
    """Encode the videos of CORPUS into the latent dataset STORE.

    CORPUS is a folder, a glob, a table (CSV, JSON, JSONL, Parquet) or tars of videos. To resume, or
    to add videos that came later, run the same command again.

    \b
    reducio-latents encode-corpus videos/ pexels.latents --weights reducio-ft4-fs32-attn23.ckpt
    """
    from reducio_latents import encode
    from reducio_latents.cli.progress import encode_progress, print_report, print_summary
    from reducio_latents.encode.stop import stop_on_signals

    if dry_run:
        print_summary(encode.plan_corpus(corpus, store, options.for_model()))
        return
    with encode_progress() as progress, stop_on_signals(on_stop=progress.stopping) as stop:
        report = encode.encode_corpus(corpus, store, options, progress=progress, stop=stop)
    print_report(report, store)
    raise SystemExit(report.exit_code)


@command("plan")
@click.argument("corpus")
@click.argument("store")
@takes(
    EncodeOptions,
    {
        "Options": """resolution buckets clip.frames clip.rate_fps clip.policy clip.seed shots
            duplicates shard_rows path_column caption_column start_column end_column root label
            workers""",
    },
)
@dry_run
def plan(corpus: str, store: str, options: EncodeOptions, dry_run: bool) -> None:
    """Probe CORPUS and write into STORE which clips it will be made of.

    encode-corpus does this by itself; on its own it shows what would come before a GPU is paid for.
    """
    from reducio_latents import encode
    from reducio_latents.cli.progress import encode_progress, print_summary

    with encode_progress() as progress:
        summary = encode.plan_corpus(corpus, store, options, progress=progress, write=not dry_run)
    print_summary(summary)


@command("add-column")
@click.argument("store")
@click.argument("columns", nargs=-1)
@click.option(
    "--replace",
    "replacing",
    type=Value(tuple[str, ...]),
    metavar="A,B,...",
    help="Columns to make anew with these options; all others stay as they are.",
)
@click.option("--corpus", help="Where the videos are, if frames are needed and they have moved.")
@takes(
    EncodeOptions,
    {
        "Options": """model weights dtype batch_size device workers zstd max_failed
            trust_config""",
        "Models": OTHER_MODELS,
    },
)
def add_column(
    store: str,
    columns: tuple[str, ...],
    replacing: tuple[str, ...] | None,
    corpus: str | None,
    options: EncodeOptions,
) -> None:
    """Add COLUMNS to STORE, or make some anew.

    Columns: content_latent, content_clip, content_clip_pooled, text, text:NAME, caption,
    content_image, motion, frame_times, scores. They are made of the stored content images and
    captions if these are exact, else of the videos. To resume, run the same command again.

    \b
    reducio-latents add-column pexels.latents content_clip text --text-model models/t5-v1_1-xxl
    reducio-latents add-column pexels.latents --replace text --text-cleaning none
    """
    from reducio_latents import encode
    from reducio_latents.cli.progress import encode_progress, print_report

    with encode_progress() as progress:
        report = encode.add_column(
            store, columns, options, replacing=replacing or (), corpus=corpus, progress=progress
        )
    print_report(report, store)
    raise SystemExit(report.exit_code)


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
