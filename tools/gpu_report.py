#!/usr/bin/env python
"""Everything about a GPU that a CPU cannot tell, in one call of less than nine minutes.

    python tools/gpu_report.py [--minutes 8] [--model reducio-random:128] [--only PARTS] > report.md

Needs torch, numpy, einops and this checkout, nothing else; frames are made up. Prints Markdown for
BENCHMARKS.md, with goals beside what was measured. Its parts, in the order in which they run:

    encode   the encoder by precision, layout, compilation and batch, against float32
    profile  the longest kernels of the fastest one, and what only moves or adds numbers
    busy     how busy the GPU is when batches come as in a run
    starts   two processes that encode by default, one with a batch in flight: the same bytes
    train    training steps by layout, checkpointing and compilation; gradients of both layouts
    decode   decoding by batch; both ways in tiles
    resize   whole frames to the clip's size, on the GPU

What there is no time for is named. To try it out: --device cpu --side 32 --model reducio-random:8.
"""

from __future__ import annotations

import argparse
import hashlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this checkout, installed or not

import bench_train

from reducio_latents.autoencoders import load_autoencoder
from reducio_latents.autoencoders.protocol import Autoencoder
from reducio_latents.core.choices import Compile
from reducio_latents.core.geometry import Bucket, square_bucket
from reducio_latents.encode.bench import (
    HEADER,
    NAIVE,
    VARIANTS,
    EncoderBench,
    Measurement,
    Variant,
    forget_peak,
    launched,
    matmul_flops,
    peak_bytes,
    table_row,
    timed,
    wait_for,
)
from reducio_latents.encode.fast_path import made_up_clips
from reducio_latents.encode.gpu import BatchEncoder, DeviceFit
from reducio_latents.vae.tiling import Tiling
from reducio_latents.video.pixels import to_uint8

BY_DEFAULT = next(v for v in VARIANTS if v.name == "bfloat16 channels_last_3d")
"""What `--device cuda` takes on a GPU that has bfloat16."""
SOURCES = ((720, 1280), (1080, 1920))
KERNELS = 15
GOALS = {
    "encode": "goal: 55 clips/s and 65 % of the matmul at 256 px on an H200, where cuDNN's "
    "convolutions alone allow about 60 clips/s",
    "profile": "goal: no kernel that copies from layout to layout",
    "busy": "goal: 97 %",
    "starts": "goal: the same bytes",
    "train": "goal: 55 % of the matmul in channels_last, no more memory than the default layout, "
    "gradients of both apart by rounding alone (2e-5 on a CPU)",
    "decode": "no goal is set: 26.3 TFLOP a clip at the published size",
    "resize": "goal: more than the encoder takes",
}
SHARES = {
    "encode": 0.45,
    "profile": 0.05,
    "busy": 0.05,
    "starts": 0.1,
    "train": 0.2,
    "decode": 0.1,
    "resize": 0.05,
}
"""What each may have of the time of all parts; what one leaves is the next one's."""
MOVES = (
    "copy",
    "clone",
    "contiguous",
    "transpose",
    "nchwToNhwc",
    "nhwcToNchw",
    "memcpy",
    "convertTensor",
)
"""In names of kernels that change nothing but where numbers lie."""


@dataclass
class Report:
    """What is measured, and what one part has found for the next."""

    device: torch.device
    model: str
    side: int
    batches: list[int]
    seconds: float
    compiles: bool
    decodes: bool
    results: list[Measurement] = field(default_factory=list)
    deadline: float = float("inf")
    """Of the part at hand, by `time.monotonic`."""

    @property
    def bucket(self) -> Bucket:
        return square_bucket(16, self.side)

    @cached_property
    def matmul(self) -> float:
        """FLOP/s of a large product in the default precision."""
        return matmul_flops(self.device, self.dtype, min(2.0, self.seconds))

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    @property
    def best(self) -> Measurement:
        """The fastest of what was measured; what is the default, if nothing was."""
        ours = [found for found in self.results if found.variant is not NAIVE]
        nothing = Measurement(
            variant=BY_DEFAULT, batch=self.batches[0], clips_per_s=0, spread=0, flops_per_s=0
        )
        return max(ours, key=lambda found: found.clips_per_s, default=nothing)

    def bench(self) -> EncoderBench:
        variants = [v for v in VARIANTS if v.compile == "none" or self.compiles]
        return EncoderBench(
            model=self.model,
            device=self.device,
            bucket=self.bucket,
            batches=self.batches,
            variants=sorted(variants, key=worth, reverse=True),
            seconds=self.seconds,
            decode=self.decodes,
            deadline=self.deadline,
        )

    def load(self, **options: Any) -> Autoencoder:
        options = {"memory_format": torch.channels_last_3d, **options}
        return load_autoencoder(self.model, None, device=self.device, dtype=self.dtype, **options)

    def is_late(self, what: str) -> bool:
        """Whether the part's time is over; then say what is left out."""
        late = time.monotonic() > self.deadline
        if late:
            print(f"skipped for want of time: {what}")
        return late


def worth(variant: Variant) -> tuple[bool, bool, bool, int]:
    """Return what to sort by: the slow ones last, and after them those that take minutes to
    compile, so that these are what is missing if time runs out."""
    bfloat16 = variant.dtype == torch.bfloat16
    channels_last = variant.layout == torch.channels_last_3d
    at_once = variant.compile != "all"
    return at_once, bfloat16, channels_last, -get_args(Compile).index(variant.compile)


def encode(report: Report) -> None:
    """Print the table line by line, so that what is measured is not lost if time runs out."""
    bench = report.bench()
    print(HEADER, flush=True)
    for found in bench.run():
        report.results.append(found)
        first = report.results[0].clips_per_s
        print(table_row(found, first, report.matmul), flush=True)
    tried = {(found.variant, found.batch) for found in report.results}
    for variant in bench.variants:
        for batch in bench.batches:
            if (variant, batch) not in tried:
                print(f"\nskipped for want of time: {variant.name}, batch {batch}")


def profile_kernels(report: Report) -> None:
    """Print the longest kernels of a batch, and the share of those that only move numbers."""
    best, bench = report.best, report.bench()
    encoder = BatchEncoder(bench.load(best.variant))
    frames = made_up_clips(best.batch, report.bucket)
    encoder.launch(frames)()
    on_gpu = report.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as found:
        encoder.launch(frames)()
    attribute = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    rows = [(getattr(row, attribute), row.count, row.key) for row in found.key_averages()]
    total = sum(us for us, _, _ in rows) or 1.0
    print(f"{best.variant.name}, batch {best.batch}: {total / 1000:.1f} ms of kernels\n")
    print("| kernel | calls | ms | share |\n|---|--:|--:|--:|")
    for us, count, name in sorted(rows, reverse=True)[:KERNELS]:
        short = name.replace("|", "/")[:90]
        print(f"| {short} | {count} | {us / 1000:.2f} | {us / total:.1%} |")
    moves = sum(us for us, _, name in rows if any(word in name for word in MOVES))
    adds = sum(us for us, _, name in rows if "add" in name.lower())
    print(f"\nonly moves numbers: {moves / total:.1%}; adds: {adds / total:.1%}")


def busy(report: Report) -> None:
    """Encode as a run does for a while; then again with what cuDNN finds fastest by trying, which a
    run does not do, as it may choose otherwise the next time."""
    best = report.best
    pad_to = best.batch if best.variant.compile != "none" else None
    encoder = BatchEncoder(report.bench().load(best.variant), pad_to=pad_to)
    frames = made_up_clips(best.batch, report.bucket)
    rate, share = busy_share(encoder, frames, 3 * report.seconds)
    said = "not measured on a CPU" if share is None else f"{share:.1%}"
    print(f"{best.variant.name}, batch {best.batch}: {rate:.3g} clips/s, GPU busy {said}")
    if share is not None:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True):
            rate, _ = busy_share(encoder, frames, report.seconds)
        print(f"the same with cudnn.benchmark: {rate:.3g} clips/s")


def busy_share(encoder: BatchEncoder, frames: Tensor, seconds: float) -> tuple[float, float | None]:
    """Feed batches as a run does; return clips/s and the GPU's busy share, None on a CPU."""
    encoder.launch(frames)()
    encoder.take_busy_s()
    start = time.perf_counter()

    def batches() -> Iterator[Tensor]:
        while time.perf_counter() - start < seconds:
            yield frames

    clips = sum(len(wait()) for wait in launched(encoder, batches()))
    wait_for(encoder.device)
    wall = time.perf_counter() - start
    busy = encoder.take_busy_s()
    return clips / wall, None if busy is None else busy / wall


def starts(report: Report) -> None:
    """Have two processes encode the same clips, the second with another batch in flight."""
    command = [sys.executable, __file__, "--device", str(report.device), "--model", report.model]
    command += ["--side", str(report.side), "--batches", str(report.batches[0])]
    found = []
    for number in range(2):
        said = subprocess.run(
            [*command, "--digest", str(number)], capture_output=True, text=True, check=False
        )
        found.append(said.stdout.strip() or f"failed: {said.stderr.strip()[-300:]}")
    print(f"{'the same bytes' if found[0] == found[1] else 'NOT the same bytes'}: {found}")


def digest(report: Report, ahead: int) -> str:
    """Return a hash of what two batches become, with so many others launched before them."""
    encoder = BatchEncoder(report.load(parts="encoder"))
    frames = made_up_clips(report.batches[0], report.bucket)
    work = [frames.flip(2)] * ahead + [frames, frames.flip(1)]
    rows = [wait() for wait in launched(encoder, work)][ahead:]
    return hashlib.sha256(b"".join(part.tobytes() for part in rows)).hexdigest()[:16]


def train(report: Report) -> None:
    """Print training steps by variant, and how far gradients of both layouts are apart."""
    width = int(report.model.rpartition(":")[2]) if ":" in report.model else 128
    base = bench_train.base_config(width, report.side)
    on_gpu = report.device.type == "cuda"
    batch = bench_train.made_up_batch(4 if on_gpu else 1, report.side)
    names = [
        "bf16 checkpointing",
        "bf16 channels_last checkpointing",
        "bf16",
        "bf16 channels_last",
        *(["bf16 compile"] if report.compiles else []),
    ]
    rounds = 5 if on_gpu else 1
    bench_train.print_table(names, base, batch, rounds, report.device, report.deadline)
    if not report.is_late("gradients"):
        print(f"\ngradients of both layouts, float32: {gradient_distance(report):.1e} apart")


def gradient_distance(report: Report) -> float:
    """Return how far the gradients of a small model lie apart, as a share of their norm."""
    video = made_up_clips(1, square_bucket(16, 64)).to(report.device).float() / 127.5 - 1
    found = []
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        small = load_autoencoder(
            "reducio-random:32", None, device=report.device, memory_format=layout
        )
        assert small.model is not None
        small.model.requires_grad_(True)
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False, deterministic=True):
            recon, _ = small.model(video.movedim(-1, 1))
            recon.square().mean().backward()
        grads = [p.grad for p in small.model.parameters()]
        found.append(torch.cat([grad.flatten() for grad in grads if grad is not None]))
    return float((found[0] - found[1]).norm() / found[0].norm())


def decode(report: Report) -> None:
    """Print how fast latents become frames that lie in the CPU's memory, and both ways in tiles."""
    model = report.load()
    print("| | batch | clips/s | of matmul | GiB |\n|---|--:|--:|--:|--:|")
    for batch in report.batches[:3]:
        if report.is_late(f"decoding, batch {batch}"):
            return
        latents, content = latents_and_content(report, model, report.side, batch)
        row("decode", report, batch, partial(decoded, model, latents, content))
    side = report.side * (4 if report.device.type == "cuda" else 2)
    model = report.load(tiling=Tiling(tile_px=report.side))
    latents, content = latents_and_content(report, model, side, 1)
    video = made_up_clips(1, square_bucket(16, side)).to(report.device)
    ways: Iterable[tuple[str, Callable[[], object]]] = (
        (f"encode {side} px in tiles", lambda: BatchEncoder(model).launch(video.cpu())()),
        (f"decode {side} px in tiles", partial(decoded, model, latents, content)),
    )
    for name, work in ways:
        if not report.is_late(name):
            row(name, report, 1, work)


def latents_and_content(
    report: Report, model: Autoencoder, side: int, batch: int
) -> tuple[Tensor, Tensor]:
    bucket = square_bucket(16, side)
    shape = (batch, *model.geometry.latent_shape(16, side, side))
    content = made_up_clips(batch, bucket)[:, 7].permute(0, 3, 1, 2).to(report.device)
    return torch.randn(shape, device=report.device), content.float() / 127.5 - 1


@torch.inference_mode()
def decoded(model: Autoencoder, latents: Tensor, content: Tensor) -> Tensor:
    """Return uint8 frames on the CPU; nothing else leaves the GPU."""
    video = model.decode(latents, content if model.needs_content else None)
    return to_uint8(video).permute(0, 2, 3, 4, 1).contiguous().cpu()


@torch.inference_mode()
def row(name: str, report: Report, batch: int, work: Callable[[], object]) -> None:
    with FlopCounterMode(display=False) as counter:
        work()
    forget_peak(report.device)
    _, times = timed(work, report.device, report.seconds)
    time_s = statistics.median(times)
    share = counter.get_total_flops() / time_s / report.matmul
    peak = peak_bytes(report.device) / 2**30
    print(f"| {name} | {batch} | {batch / time_s:.3g} | {share:.0%} | {peak:.1f} |", flush=True)


def resize(report: Report) -> None:
    """Say how fast clips are uploaded whole, resized and brought back, one after another."""
    fit, bucket = DeviceFit(report.device), report.bucket
    for height, width in SOURCES if report.device.type == "cuda" else SOURCES[:1]:
        if report.is_late(f"from {width}x{height}"):
            continue
        frames = made_up_clips(1, Bucket(bucket.frames, height, width))[0]
        _, times = timed(
            lambda f=frames: fit(f, bucket, "bicubic"),  # type: ignore[misc]
            report.device,
            report.seconds,
        )
        print(f"from {width}x{height}: {1 / statistics.median(times):.3g} clips/s")


PARTS: dict[str, Callable[[Report], None]] = {
    "encode": encode,
    "profile": profile_kernels,
    "busy": busy,
    "starts": starts,
    "train": train,
    "decode": decode,
    "resize": resize,
}


def describe(device: torch.device) -> str:
    name = platform.processor() or platform.machine()
    cuda = ""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        cuda = f", CUDA {torch.version.cuda}, driver {driver()}"
    return f"{name}, torch {torch.__version__}{cuda}"


def driver() -> str:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=False).stdout
    except OSError:
        return "unknown"
    return said.partition("\n")[0] or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--model", default="reducio-random:128")
    parser.add_argument("--device", default="cuda", help="cpu is for trying this script out")
    parser.add_argument("--side", type=int, default=256, help="of the clips, in px")
    parser.add_argument("--batches", default="8,16,32,4")
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement, about")
    parser.add_argument("--only", default=",".join(PARTS), help="comma-separated parts")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--no-decode", action="store_true", help="no PSNR loss")
    parser.add_argument(
        "--digest", type=int, help="print the hash of a batch, after so many others"
    )
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        sys.exit("there is no GPU here. To try this script out: --device cpu --side 32.")
    report = Report(
        device=device,
        model=arguments.model,
        side=arguments.side,
        batches=[int(size) for size in arguments.batches.split(",")],
        seconds=arguments.seconds,
        compiles=not arguments.no_compile,
        decodes=not arguments.no_decode,
    )
    if arguments.digest is not None:
        print(digest(report, arguments.digest))
        return
    begin, limit_s = time.monotonic(), 60 * arguments.minutes
    print(f"{describe(device)}; {str(report.dtype)[6:]} matmul {report.matmul / 1e12:.3g} TFLOP/s")
    share, names = 0.0, arguments.only.split(",")
    for name in names:
        share += SHARES[name] / sum(SHARES[part] for part in names)
        report.deadline = begin + share * limit_s
        print(f"\n## {name}\n\n{GOALS[name]}\n", flush=True)
        if name != "encode" and report.is_late(name):
            continue
        try:
            PARTS[name](report)
        except (torch.OutOfMemoryError, RuntimeError) as err:  # the next parts are worth having
            print(f"FAILED: {type(err).__name__}: {str(err)[:300]}")
        if device.type == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
