"""What the fast ways to encode cost: held against float32, eager, without TF32."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reducio_latents.autoencoders.protocol import Autoencoder, decoded_psnr
from reducio_latents.core.geometry import Bucket
from reducio_latents.core.values import Posterior
from reducio_latents.errors import ConfigError
from reducio_latents.video.pixels import to_unit

log = logging.getLogger(__name__)

DEFAULT_BATCH = 8
BATCH_SIZE = "batch_size"
"""Under which a column keeps what `fastest_batch` found."""
TIMED_BATCHES = 3
"""Batches of one measurement."""
MOST_PIXELS = 64 * 16 * 256**2
"""Of all frames of a batch."""

FLOAT32_ERROR = "float32_error"
"""Under which a column keeps `FastPathError.relative`."""
MOST_ERROR = 0.05
"""The `float32_error` above which `--dtype auto` takes float32. bfloat16 rounds by 0.2 % at each of
some 100 layers, which come to 1.5 to 3 % for Reducio-VAE; broken kernels give 100 %."""


class FastPathError(NamedTuple):
    """How far stored numbers are from those of float32."""

    relative: float
    """Of the mean, 2-norm."""
    psnr_loss_db: float | None
    """PSNR of the video decoded from exact numbers, less that from the fast ones; the decoder is
    the exact one. None if nothing was decoded."""


def fast_path_error(
    moments: NDArray[np.floating[Any]], exact: Autoencoder, frames_BTHWC: Tensor, *, decode: bool
) -> FastPathError:
    """Compare moments (B, 2D, t, h, w) of uint8 frames, as they are stored, with those of `exact`.

    `exact` encodes in float32; with `decode` it needs its decoder.
    """
    video = to_unit(frames_BTHWC.to(exact.device))
    ours = Posterior.of_moments(torch.from_numpy(moments).float().to(exact.device))
    with true_float32():
        theirs = exact.encode(video)
        relative = float((ours.mean - theirs.mean).norm() / theirs.mean.norm())
        if not decode:
            return FastPathError(relative, None)
        exact_db, fast_db = (float(decoded_psnr(exact, p, video).mean()) for p in (theirs, ours))
    return FastPathError(relative, exact_db - fast_db)


def is_exact(precision: Mapping[str, Any]) -> bool:
    """Whether an autoencoder's precision is what the fast ones are held against."""
    return (
        precision.get("dtype") == "float32"
        and precision.get("memory_format", "contiguous_format") == "contiguous_format"
        and precision.get("compiled", "none") == "none"
        and not precision.get("tf32")
    )


def measure(
    encode: Callable[[Tensor], NDArray[np.floating[Any]]],
    load_exact: Callable[[], Autoencoder],
    bucket: Bucket,
    *,
    decode: bool,
) -> dict[str, float]:
    """Return what `ColumnMeta.measured` says of a fast path, on one clip that is made up.

    Empty, with a warning, where the exact model does not fit in memory beside the fast one.
    """
    frames = made_up_clips(1, bucket)
    try:
        error = fast_path_error(encode(frames), load_exact(), frames, decode=decode)
    except torch.OutOfMemoryError:
        log.warning("float32 does not fit in memory, so the error of the fast path is not known.")
        return {}
    found = {FLOAT32_ERROR: float(f"{error.relative:.3g}")}
    if error.psnr_loss_db is not None:
        found["float32_psnr_loss_db"] = round(error.psnr_loss_db, 4)
    return found


def fastest_batch(
    launch: Callable[[Tensor], Callable[[], object]],
    bucket: Bucket,
    clock: Callable[[], float] = time.perf_counter,
) -> int:
    """Return with how many clips of a bucket a GPU is fastest: the smallest of `batch_sizes` within
    2 % of the best, and the last before one that does not fit in memory.

    `launch` begins to encode uint8 frames (B, T, H, W, 3) and returns what waits for that.
    """
    rates: dict[int, float] = {}
    frames = made_up_clips(1, bucket)
    for size in batch_sizes(bucket):
        batch = frames.expand(size, *frames.shape[1:])
        try:
            launch(batch)()  # what is done at the first time only
            start = clock()
            for wait in [launch(batch) for _ in range(TIMED_BATCHES)]:
                wait()
            rates[size] = TIMED_BATCHES * size / (clock() - start)
        except (torch.OutOfMemoryError, ConfigError):
            break
    best = max(rates.values(), default=0.0)
    return next((size for size, rate in rates.items() if rate >= 0.98 * best), 1)


def batch_sizes(bucket: Bucket) -> list[int]:
    """Return the sizes to try: 8 to 64 for clips of 16x256x256, fewer of larger ones."""
    most = MOST_PIXELS // (bucket.frames * bucket.height * bucket.width)
    return [size for size in (1, 2, 4, 8, 16, 32, 64) if size <= max(1, most)][-4:]


@contextmanager
def true_float32() -> Iterator[None]:
    """Have float32 mean all of its 24 bits: convolutions and matmuls without TF32."""
    switches: tuple[Any, ...] = (torch.backends.cudnn, torch.backends.cuda.matmul)
    before = [switch.allow_tf32 for switch in switches]
    try:
        for switch in switches:
            switch.allow_tf32 = False
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.allow_tf32 = value


def made_up_clips(clips: int, bucket: Bucket) -> Tensor:
    """Return clips of moving ramps under a fixed grain, uint8 (B, T, H, W, 3)."""
    axes = (torch.arange(size) for size in (bucket.frames, bucket.height, bucket.width))
    t, y, x = torch.meshgrid(*axes, indexing="ij")
    ramps = torch.stack([x + 2 * t, y - t, x + y + 3 * t], dim=-1)
    generator = torch.Generator().manual_seed(0)
    grain = torch.randint(-8, 9, (bucket.height, bucket.width, 3), generator=generator)
    # Up and down again: a jump from 255 to 0 is an edge that no video is full of.
    waves = [((ramps + 17 * clip) % 510 - 255).abs() + grain for clip in range(clips)]
    return torch.stack(waves).clamp(0, 255).to(torch.uint8)
