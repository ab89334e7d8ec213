#!/usr/bin/env python
"""Everything about encoding that needs a GPU, in one call of less than nine minutes.

    python tools/gpu_report.py [--minutes 7] [--model reducio-random:128] > report.md

Needs torch, numpy, einops and this checkout, nothing else; frames are made up. Prints Markdown for
BENCHMARKS.md: the matmul that all is measured against, the encoder by precision, layout,
compilation and batch, what each costs against float32 eager, how busy the GPU is when batches come
as in a run, and how fast whole frames are resized there. What there is no time for is named.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
import time
from pathlib import Path
from typing import get_args

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

from reducio_latents.core.choices import Compile
from reducio_latents.core.geometry import Bucket, square_bucket
from reducio_latents.encode.bench import (
    HEADER,
    NAIVE,
    VARIANTS,
    EncoderBench,
    Measurement,
    Variant,
    busy_share,
    matmul_flops,
    table_row,
    timed,
)
from reducio_latents.encode.fast_path import made_up_clips
from reducio_latents.encode.gpu import BatchEncoder, DeviceFit

KEPT_FOR_THE_END_S = 30.0
SOURCES = ((720, 1280), (1080, 1920))


def encoder_table(bench: EncoderBench, matmul: float) -> list[Measurement]:
    """Print the table line by line, so that what is measured is not lost if time runs out."""
    print(HEADER, flush=True)
    results: list[Measurement] = []
    for found in bench.run():
        results.append(found)
        print(table_row(found, results[0].clips_per_s, matmul), flush=True)
    tried = {(found.variant, found.batch) for found in results}
    for variant in bench.variants:
        for batch in bench.batches:
            if (variant, batch) not in tried:
                print(f"\nskipped for want of time: {variant.name}, batch {batch}")
    return results


def worth(variant: Variant) -> tuple[bool, bool, bool, int]:
    """Return what to sort by: the slow ones last, and after them those that take minutes to
    compile, so that these are what is missing if time runs out."""
    bfloat16 = variant.dtype == torch.bfloat16
    channels_last = variant.layout == torch.channels_last_3d
    at_once = variant.compile != "all"
    return at_once, bfloat16, channels_last, get_args(Compile).index(variant.compile)


def fastest(results: list[Measurement]) -> Measurement | None:
    ours = [found for found in results if found.variant is not NAIVE]
    return max(ours, key=lambda found: found.clips_per_s, default=None)


def print_busy(bench: EncoderBench, best: Measurement, seconds: float) -> None:
    """Encode as a run does for a while; then again with what cuDNN finds fastest by trying, which a
    run does not do, as it may choose otherwise the next time."""
    pad_to = best.batch if best.variant.compile != "none" else None
    encoder = BatchEncoder(bench.load(best.variant), pad_to=pad_to)
    frames = made_up_clips(best.batch, bench.bucket)
    rate, busy = busy_share(encoder, frames, seconds)
    share = "not measured on a CPU" if busy is None else f"{busy:.1%}"
    print(f"{best.variant.name}, batch {best.batch}: {rate:.3g} clips/s, GPU busy {share}")
    if busy is not None:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            rate, _ = busy_share(encoder, frames, seconds / 2)
        print(f"the same with cudnn.benchmark: {rate:.3g} clips/s", flush=True)


def print_resize(device: torch.device, bucket: Bucket, seconds: float, deadline: float) -> None:
    """Say how fast clips are uploaded whole, resized and brought back, one after another."""
    fit = DeviceFit(device)
    for height, width in SOURCES if device.type == "cuda" else SOURCES[:1]:
        if time.monotonic() > deadline:
            print(f"skipped for want of time: resize from {width}x{height}")
            continue
        source = Bucket(bucket.frames, height, width)
        frames = made_up_clips(1, source)[0]
        _, times = timed(lambda f=frames: fit(f, bucket, "bicubic"), device, seconds)  # type: ignore[misc]
        print(f"resized from {width}x{height}: {1 / statistics.median(times):.3g} clips/s")


def describe(device: torch.device) -> str:
    name = platform.processor() or platform.machine()
    cuda = ""
    if device.type == "cuda":
        name, cuda = torch.cuda.get_device_name(device), f", CUDA {torch.version.cuda}"
    return f"{name}, torch {torch.__version__}{cuda}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--model", default="reducio-random:128")
    parser.add_argument("--device", default="cuda", help="cpu is for trying this script out")
    parser.add_argument("--side", type=int, default=256, help="of the clips, in px")
    parser.add_argument("--batches", default="8,16,32,4")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement, about")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-decode", action="store_true", help="no PSNR loss")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU here. To try this script out: --device cpu --side 32.")
    deadline = time.monotonic() + 60 * arguments.minutes
    variants = [v for v in VARIANTS if v.compile == "none" or not arguments.no_compile]
    variants.sort(key=worth, reverse=True)
    bench = EncoderBench(
        model=arguments.model,
        device=device,
        bucket=square_bucket(16, arguments.side),
        batches=[int(size) for size in arguments.batches.split(",")],
        variants=variants,
        seconds=arguments.seconds,
        decode=not arguments.no_decode,
        deadline=deadline - KEPT_FOR_THE_END_S,
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    matmul = matmul_flops(device, dtype, min(2.0, arguments.seconds))
    print(f"{describe(device)}; {str(dtype)[6:]} matmul {matmul / 1e12:.3g} TFLOP/s\n", flush=True)
    results = encoder_table(bench, matmul)
    best = fastest(results)
    print()
    if best is not None and time.monotonic() < deadline - KEPT_FOR_THE_END_S / 2:
        print_busy(bench, best, 3 * arguments.seconds)
    else:
        print("skipped for want of time: busy share")
    print_resize(device, bench.bucket, arguments.seconds, deadline)
    if device.type == "cuda":
        print(f"peak memory of the GPU {torch.cuda.max_memory_allocated(device) / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
