"""`reducio-latents encode-corpus`."""

from __future__ import annotations

import click

from reducio_latents.cli.ending import InterruptedBySignal
from reducio_latents.cli.options import command, dry_run, takes
from reducio_latents.encode.options import EncodeOptions

MODELS = """content_latent.model content_latent.dtype
    content_clip.model content_clip.dtype content_clip.resize content_clip.quantization
    text.model text.dtype text.cleaning text.max_tokens text.values"""


@command("encode-corpus")
@click.argument("corpus")
@click.argument("store")
@takes(
    EncodeOptions,
    {
        "Options": """model weights columns resolution clip.policy dtype batch_size compile device
            gpus workers retry_failed""",
        "Corpus and clips": """buckets clip.frames clip.rate_fps clip.seed duplicates
            path_column caption_column root video_backend""",
        "Store": "container image_codec resize tiling shard_rows zstd",
        "Other columns": MODELS,
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
    from reducio_latents.encode.stop import StoppedError, stop_on_signals

    if dry_run:
        print_summary(encode.plan_corpus(corpus, store, options))
        return
    with (
        encode_progress() as progress,
        stop_on_signals(on_stop=lambda seconds: progress.stopping(seconds, stop.signal)) as stop,
    ):
        try:
            report = encode.encode_corpus(corpus, store, options, progress=progress, stop=stop)
        except StoppedError:
            raise InterruptedBySignal(stop.signal) from None
    print_report(report, store)
    raise SystemExit(report.exit_code)
