"""How fast clips are encoded, against the loop that most scripts have, and where the time goes.

    python tools/bench_encode.py [--model reducio-random:128] [--device cuda] [--corpus FOLDER]

Encoder alone, on frames that are made up: the naive loop (batch 1, float32, copies and results
waited for), ours eager, ours compiled; ratios, FLOP/s, and the share of a matmul that is measured
here. With --corpus also whole runs over videos: the naive loop decodes in the loop.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from reducio_latents import load_autoencoder
from reducio_latents.autoencoders.protocol import Autoencoder
from reducio_latents.encode.gpu import BatchEncoder
from reducio_latents.pixels import to_unit


@dataclass(frozen=True)
class Variant:
    """A way to encode."""

    name: str
    dtype: torch.dtype
    layout: torch.memory_format
    compiled: bool


@dataclass(frozen=True)
class Result:
    """What came of it. Times are medians over repetitions."""

    variant: str
    batch: int
    clips_per_s: float
    spread: float
    """(slowest - fastest) / median."""
    flops_per_s: float
    error: float
    """Relative error of the mean against float32 eager, 2-norm."""


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device, seconds: float) -> list[float]:
    """Repeat `work` for about `seconds`, at least three times; return the time of each."""
    work()
    wait_for(device)
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        work()
        wait_for(device)
        times.append(time.perf_counter() - start)
    return times


def matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 2.0) -> float:
    """Return the FLOP/s of a large square matmul, the best of its repetitions."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device, seconds))


def flops_per_clip(autoencoder: Autoencoder, side: int) -> int:
    """Return the floating point operations of encoding one clip of 16 x side x side."""
    video = torch.zeros(1, 3, 16, side, side, device=autoencoder.device, dtype=autoencoder.dtype)
    with FlopCounterMode(display=False) as counter:
        autoencoder.encode(video)
    return int(counter.get_total_flops())


def made_up(clips: int, side: int) -> Tensor:
    """Return smooth moving patterns, uint8 (B, T, H, W, 3): no video library is needed."""
    t, y, x = torch.meshgrid(
        torch.arange(16), torch.arange(side), torch.arange(side), indexing="ij"
    )
    base = torch.stack([x + 2 * t, y - t, x + y + 3 * t], dim=-1)
    return torch.stack([(base + 17 * clip) % 256 for clip in range(clips)]).to(torch.uint8)


def variants(device: torch.device, *, compiled: bool) -> list[Variant]:
    fast = torch.bfloat16
    layout = torch.channels_last_3d if device.type == "cuda" else torch.contiguous_format
    found = [
        Variant("eager float32", torch.float32, torch.contiguous_format, False),
        Variant("eager bfloat16", fast, torch.contiguous_format, False),
        Variant("eager bfloat16 channels_last_3d", fast, torch.channels_last_3d, False),
    ]
    if compiled:
        found.append(Variant("compiled bfloat16", fast, layout, True))
    return found


def load(model: str, variant: Variant, device: torch.device, weights: str | None) -> Autoencoder:
    return load_autoencoder(
        model,
        weights,
        device=device,
        dtype=variant.dtype,
        parts="encoder",
        compile=variant.compiled,
        memory_format=variant.layout,
    )


def naive(autoencoder: Autoencoder, frames: Tensor) -> list[Tensor]:
    """Encode one clip after another, waiting for each, as most scripts do."""
    found = []
    for clip in frames:
        video = clip.float().permute(3, 0, 1, 2)[None] / 127.5 - 1
        found.append(autoencoder.encode(video.to(autoencoder.device)).mean.cpu())
    return found


def ours(encoder: BatchEncoder, batches: Sequence[Tensor]) -> list[Tensor]:
    """Encode batch after batch, the next one launched before this one is waited for."""
    waiting, found = [], []
    for frames in batches:
        waiting.append(encoder.launch(frames))
        if len(waiting) > 1:
            found.append(torch.from_numpy(waiting.pop(0)()))
    return found + [torch.from_numpy(wait()) for wait in waiting]


def relative_error(fast: Autoencoder, exact: Tensor, frames: Tensor) -> float:
    mean = fast.encode(to_unit(frames.to(fast.device), fast.dtype)).mean.cpu()
    return float((mean - exact).norm() / exact.norm())


def bench_encoder(
    model: str,
    device: torch.device,
    *,
    side: int,
    batches: Sequence[int],
    compiled: bool,
    weights: str | None = None,
    seconds: float = 5.0,
    deadline: float = float("inf"),
) -> list[Result]:
    """Measure the naive loop, then every variant with every batch size; say what is skipped."""
    base = Variant("naive: batch 1, float32", torch.float32, torch.contiguous_format, False)
    exact_model = load(model, base, device, weights)
    flops = flops_per_clip(exact_model, side)
    sample = made_up(2, side)
    exact = exact_model.encode(to_unit(sample.to(device))).mean.cpu()
    times = timed(lambda: naive(exact_model, sample), device, seconds)
    results = [_result(base.name, 1, 2, times, flops, 0.0)]
    for variant in variants(device, compiled=compiled):
        autoencoder = load(model, variant, device, weights)
        error = relative_error(autoencoder, exact, sample)
        for batch in batches:
            if time.monotonic() > deadline:
                print(f"skipped for want of time: {variant.name}, batch {batch}")
                continue
            encoder = BatchEncoder(autoencoder, pad_to=batch if variant.compiled else None)
            work = [made_up(batch, side)] * 3
            times = timed(lambda e=encoder, w=work: ours(e, w), device, seconds)  # type: ignore[misc]
            fits = encoder.batch_limit(work[0].shape[1:])
            name = variant.name + ("" if fits is None else f" (only {fits} fit)")
            results.append(_result(name, batch, 3 * batch, times, flops, error))
    return results


def _result(
    name: str, batch: int, clips: int, times: list[float], flops: int, error: float
) -> Result:
    median = statistics.median(times)
    spread = (max(times) - min(times)) / median
    return Result(name, batch, clips / median, spread, flops * clips / median, error)


def table(results: Sequence[Result], matmul: float) -> str:
    """Return a Markdown table: ratios to the first result, share of the matmul."""
    lines = [
        "| | batch | clips/s | x naive | GFLOP/s | of matmul | error | spread |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for r in results:
        lines.append(
            f"| {r.variant} | {r.batch} | {r.clips_per_s:.3g} | "
            f"{r.clips_per_s / results[0].clips_per_s:.2f} | {r.flops_per_s / 1e9:.4g} | "
            f"{r.flops_per_s / matmul:.0%} | {r.error:.1e} | {r.spread:.0%} |"
        )
    return "\n".join(lines)


def bench_corpus(model: str, corpus: Path, device: str, side: int) -> str:
    """Encode a corpus by the naive loop and by a run, and return ratio and shares of the stages."""
    from reducio_latents import encode_corpus, open_store
    from reducio_latents.geometry import Bucket
    from reducio_latents.pixels import fit_frame
    from reducio_latents.video import VideoSource, get_backend

    with tempfile.TemporaryDirectory() as scratch:
        store = Path(scratch) / "store"
        report = encode_corpus(corpus, store, model=model, resolution=side, device=device)
        encode_s = sum(report.stages.values())
        plan = open_store(store).plan
        clips = [c for s in plan.shards() for c in plan.shard_clips(s.bucket, s.shard).to_pylist()]
        autoencoder = load_autoencoder(model, device=device, parts="encoder")
        start = time.perf_counter()
        for clip in clips:
            source = VideoSource(str(corpus / clip["video"]))
            read = get_backend("pyav").read_clips(
                source, [clip["start_s"]], frames=16, rate_fps=16.0
            )
            found = next(iter(read))
            if isinstance(found, Exception):
                continue
            bucket = Bucket.parse(clip["bucket"])
            pixels = [torch.from_numpy(fit_frame(f, bucket, "bicubic")) for f in found.frames]
            moments = naive(autoencoder, torch.stack(pixels)[None])
            torch.save(moments, Path(scratch) / f"{clip['clip_id']}.pt")
        naive_s = time.perf_counter() - start
    stages = {name: s for name, s in report.stages.items() if name != "gpu busy"}
    shares = ", ".join(f"{name} {s / sum(stages.values()):.0%}" for name, s in stages.items())
    return (
        f"{len(clips)} clips: naive loop {naive_s:.1f} s, ours {encode_s:.1f} s of the encoding "
        f"thread ({naive_s / encode_s:.2f} x). Its time: {shares}."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="reducio-random:128")
    parser.add_argument("--weights")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--side", type=int, default=256, help="of the clips, in px")
    parser.add_argument("--batches", default="8,16,32")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--corpus", type=Path)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    matmul = matmul_flops(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    print(f"torch {torch.__version__}, {device}, matmul {matmul / 1e12:.3g} TFLOP/s")
    results = bench_encoder(
        arguments.model,
        device,
        side=arguments.side,
        batches=[int(size) for size in arguments.batches.split(",")],
        compiled=not arguments.no_compile,
        weights=arguments.weights,
        seconds=arguments.seconds,
    )
    print(table(results, matmul))
    if arguments.corpus is not None:
        print(bench_corpus(arguments.model, arguments.corpus, arguments.device, arguments.side))


if __name__ == "__main__":
    main()
