"""How fast an encoder is by precision, layout, compilation and batch, against a naive loop.

Frames are made up, so torch, numpy, einops and this package are all that is needed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from reducio_latents.autoencoders import load_autoencoder
from reducio_latents.autoencoders.protocol import Autoencoder
from reducio_latents.core.choices import Compile
from reducio_latents.core.geometry import Bucket
from reducio_latents.encode.fast_path import FastPathError, fast_path_error, made_up_clips
from reducio_latents.encode.gpu import BatchEncoder, Result, raise_compile_limit

BATCHES = 3
"""Batches of one measurement: the next one is launched before the first is waited for."""
MATMUL_SIDE = {"cuda": 8192, "cpu": 1024}


@dataclass(frozen=True)
class Variant:
    """A way to encode."""

    name: str
    dtype: torch.dtype
    layout: torch.memory_format = torch.contiguous_format
    compile: Compile = "none"


NAIVE = Variant("naive: batch 1, float32, no overlap", torch.float32)
VARIANTS = (
    Variant("float32", torch.float32),
    Variant("float32 channels_last_3d", torch.float32, torch.channels_last_3d),
    Variant("bfloat16", torch.bfloat16),
    Variant("bfloat16 channels_last_3d", torch.bfloat16, torch.channels_last_3d),
    Variant(
        "bfloat16 channels_last_3d, norms compiled", torch.bfloat16, torch.channels_last_3d, "norms"
    ),
    Variant("float32 compiled", torch.float32, compile="all"),
    Variant("bfloat16 compiled", torch.bfloat16, compile="all"),
    Variant("bfloat16 channels_last_3d compiled", torch.bfloat16, torch.channels_last_3d, "all"),
)


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What came of a variant. Times are medians over repetitions."""

    variant: Variant
    batch: int
    clips_per_s: float
    spread: float
    """(slowest - fastest) / median."""
    flops_per_s: float
    error: FastPathError | None = None
    """Of what would be stored, against float32 eager; None for the naive loop."""
    fits: int | None = None
    """Clips that fit in memory at once, where that is fewer than the batch."""
    warm_up_s: float = 0.0
    """What the first batch took, compilation included."""
    peak_bytes: int = 0
    """Most memory of the GPU in use; 0 on a CPU."""


@dataclass(frozen=True, kw_only=True)
class EncoderBench:
    """What is measured: a model, on a device, on clips of one size."""

    model: str
    device: torch.device
    bucket: Bucket
    weights: str | None = None
    trust_config: bool = False
    batches: Sequence[int] = (8,)
    variants: Sequence[Variant] = VARIANTS
    seconds: float = 5.0
    """Of each measurement; there are at least three repetitions."""
    decode: bool = False
    """Whether to measure also what the decoded video loses; takes the decoder into memory."""
    deadline: float = field(default=float("inf"))
    """By `time.monotonic`: what would begin after it is left out."""

    def load(self, variant: Variant, *, decoder: bool = False) -> Autoencoder:
        autoencoder = load_autoencoder(
            self.model,
            self.weights,
            device=self.device,
            dtype=variant.dtype,
            parts="all" if decoder else "encoder",
            compile=variant.compile,
            memory_format=variant.layout,
            trust_config=self.trust_config,
        )
        if variant.compile != "none":
            raise_compile_limit(autoencoder, [self.bucket])
        return autoencoder

    def run(self) -> Iterator[Measurement]:
        """Yield the naive loop, then every variant with every batch size."""
        exact = self.load(NAIVE, decoder=self.decode)
        exact.check_clip(self.bucket.frames, self.bucket.height, self.bucket.width)
        flops = flops_per_clip(exact, self.bucket)
        sample = made_up_clips(2, self.bucket)
        warm_up_s, times = timed(lambda: naive(exact, sample), self.device, self.seconds)
        yield _measurement(NAIVE, 1, len(sample), times, flops, warm_up_s=warm_up_s)
        for variant in self.variants:
            if time.monotonic() < self.deadline:
                yield from self._measure(variant, exact, flops, sample)

    def _measure(
        self, variant: Variant, exact: Autoencoder, flops: int, sample: Tensor
    ) -> Iterator[Measurement]:
        autoencoder = self.load(variant)
        for batch in self.batches:
            if time.monotonic() > self.deadline:
                return
            encoder = BatchEncoder(autoencoder, pad_to=batch if variant.compile != "none" else None)
            frames = made_up_clips(batch, self.bucket)
            work = [frames] * BATCHES

            def encode(encoder: BatchEncoder = encoder, work: list[Tensor] = work) -> object:
                return [wait() for wait in launched(encoder, work)]

            forget_peak(self.device)
            warm_up_s, times = timed(encode, self.device, self.seconds)
            peak = peak_bytes(self.device)
            moments = encoder.launch(sample)()
            yield _measurement(
                variant,
                batch,
                BATCHES * batch,
                times,
                flops,
                error=fast_path_error(moments, exact, sample, decode=self.decode),
                fits=encoder.batch_limit(frames.shape[1:]),
                warm_up_s=warm_up_s,
                peak_bytes=peak,
            )


def launched(encoder: BatchEncoder, batches: Iterable[Tensor]) -> Iterator[Result]:
    """Yield what waits for each batch, after the next one has been launched."""
    ahead: Result | None = None
    for frames in batches:
        now = encoder.launch(frames)
        if ahead is not None:
            yield ahead
        ahead = now
    if ahead is not None:
        yield ahead


def naive(autoencoder: Autoencoder, clips: Iterable[Tensor]) -> list[Tensor]:
    """Encode uint8 clips one after another, waiting for each, as most scripts do."""
    found = []
    for clip in clips:
        video = clip.float().permute(3, 0, 1, 2)[None] / 127.5 - 1
        found.append(autoencoder.encode(video.to(autoencoder.device)).mean.cpu())
    return found


def matmul_flops(device: torch.device, dtype: torch.dtype, seconds: float = 2.0) -> float:
    """Return the FLOP/s of a large square matmul, the best of its repetitions."""
    size = MATMUL_SIDE.get(device.type, MATMUL_SIDE["cuda"])
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / min(timed(lambda: a @ b, device, seconds)[1])


def flops_per_clip(autoencoder: Autoencoder, bucket: Bucket) -> int:
    """Return the floating point operations of encoding one clip; 2 for a multiply and add."""
    size = (1, 3, bucket.frames, bucket.height, bucket.width)
    video = torch.zeros(size, device=autoencoder.device, dtype=autoencoder.dtype)
    with FlopCounterMode(display=False) as counter:
        autoencoder.encode(video)
    return int(counter.get_total_flops())


def timed(
    work: Callable[[], object], device: torch.device, seconds: float
) -> tuple[float, list[float]]:
    """Repeat `work` for about `seconds`, at least three times.

    Return the time of a first call, which is not counted, and those of the others.
    """
    first = _time(work, device)
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        times.append(_time(work, device))
    return first, times


def _time(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - start


def forget_peak(device: torch.device) -> None:
    """Begin to look for the most memory in use anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_bytes(device: torch.device) -> int:
    """Return the most memory in use since then, on a GPU; 0 on a CPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _measurement(
    variant: Variant, batch: int, clips: int, times: list[float], flops: int, **more: Any
) -> Measurement:
    median = statistics.median(times)
    return Measurement(
        variant=variant,
        batch=batch,
        clips_per_s=clips / median,
        spread=(max(times) - min(times)) / median,
        flops_per_s=flops * clips / median,
        **more,
    )


HEADER = (
    "| | batch | clips/s | x naive | TFLOP/s | of matmul | error | PSNR loss, dB | first, s "
    "| spread | GiB |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|"
)


def table_row(found: Measurement, naive_clips_per_s: float, matmul: float) -> str:
    """Return a line of a Markdown table under `HEADER`: ratio to naive, share of the matmul."""
    error, loss = "", ""
    if found.error is not None:
        error = f"{found.error.relative:.1e}"
        if found.error.psnr_loss_db is not None:
            loss = f"{found.error.psnr_loss_db:.3f}"
    fits = "" if found.fits is None else f" (only {found.fits} fit)"
    return (
        f"| {found.variant.name}{fits} | {found.batch} | {found.clips_per_s:.3g} | "
        f"{found.clips_per_s / naive_clips_per_s:.2f} | {found.flops_per_s / 1e12:.3g} | "
        f"{found.flops_per_s / matmul:.0%} | {error} | {loss} | {found.warm_up_s:.1f} | "
        f"{found.spread:.0%} | {found.peak_bytes / 2**30:.1f} |"
    )
