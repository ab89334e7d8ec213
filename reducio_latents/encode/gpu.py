"""Keeping a GPU busy: copies beside the computation, two batches on their way, and
smaller batches if memory runs out. On a CPU the same calls encode at once.

Per batch of uint8 frames: pinned copy -> [copy stream] device -> [compute stream] to [-1, 1],
encode, to float16 -> [copy stream] pinned rows. `launch` returns when all of it is queued.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reducio_latents.autoencoders.protocol import Autoencoder
from reducio_latents.core.geometry import Bucket
from reducio_latents.errors import ConfigError
from reducio_latents.vae.tiling import cut
from reducio_latents.video.pixels import to_unit
from reducio_latents.video.planes import PlaneLayout, fit_whole

log = logging.getLogger(__name__)

Moments = NDArray[np.float16]
Result = Callable[[], Moments]
"""Waits for a batch that was launched and returns its moments, (B, 2D, t, h, w)."""
INPUTS = 2
"""Pinned buffers for frames; the third launch waits until the first one's copy is done."""


HALVINGS = 3
"""Batch sizes beside the first that a compiled encoder may come to see for lack of memory."""
NORM_SIZES = 16
"""Sizes that the norms of one network see, at most: levels, and the channels before and after."""


def raise_compile_limit(autoencoder: Autoencoder, buckets: Sequence[Bucket]) -> None:
    """Let torch.compile make one program for each size of input; it would stop after eight.

    The sizes are those of the buckets, or of the tiles that the autoencoder cuts them into.
    """
    from torch._dynamo import config

    wanted = NORM_SIZES * (1 + HALVINGS) * len(input_sizes(autoencoder, buckets))
    config.recompile_limit = max(config.recompile_limit, wanted)
    config.accumulated_recompile_limit = max(config.accumulated_recompile_limit, 8 * wanted)


def input_sizes(autoencoder: Autoencoder, buckets: Sequence[Bucket]) -> frozenset[tuple[int, ...]]:
    """Return every (T, H, W) that the autoencoder's networks see of clips of these buckets."""
    tiling = autoencoder.tiling
    sizes = set()
    for bucket in buckets:
        whole = torch.empty(bucket.height, bucket.width, device="meta")
        grid = [[whole]] if tiling is None else cut(whole, tiling.tile_px, tiling.overlap)
        sizes |= {(bucket.frames, *tile.shape) for row in grid for tile in row}
    return frozenset(sizes)


class DeviceFit:
    """Fits decoded clips to their bucket on a device, beside what that computes: a `Fit`.

    Frames go there whole and come back at the bucket's size, so the memory of waiting batches is
    that of small frames. To be called by one thread at a time.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self._pinned = torch.empty(0, dtype=torch.uint8)

    @cached_property
    def _stream(self) -> torch.cuda.Stream:
        # Before the encoder's kernels, which would keep a few small ones waiting for long.
        return _stream(self._device, priority=-1)

    def __call__(
        self, frames: Tensor, bucket: Bucket, mode: str, layout: PlaneLayout | None = None
    ) -> Tensor:
        """Return uint8 frames (T, H, W, 3) on the CPU; see `fit_whole`."""
        try:
            if not _on_gpu(self._device):
                return fit_whole(frames.to(self._device), bucket, mode, layout).cpu()
            with torch.cuda.stream(self._stream):
                return fit_whole(self._upload(frames), bucket, mode, layout).cpu()
        except torch.OutOfMemoryError:
            log.warning("no memory on %s to resize a clip; done on the CPU.", self._device)
            return fit_whole(frames, bucket, mode, layout)

    def _upload(self, frames: Tensor) -> Tensor:
        if self._pinned.numel() < frames.numel():
            self._pinned = _pinned((frames.numel(),))
        pinned = self._pinned[: frames.numel()].view(frames.shape)
        pinned.copy_(frames)
        return pinned.to(self._device, non_blocking=True)


@dataclass
class _Input:
    """A pinned buffer, and when the copy out of it is done."""

    buffer: Tensor
    copied: torch.cuda.Event


class BatchEncoder:
    """Encodes batches of frames into moments.

    A batch that does not fit in memory is cut in halves until its parts do, and the size is
    remembered for clips of that shape. With `pad_to` every part has that many clips, or as many as
    fit, the last one repeated: a compiled encoder then sees one size for each shape.
    """

    def __init__(self, autoencoder: Autoencoder, *, pad_to: int | None = None) -> None:
        self._autoencoder = autoencoder
        self._pad_to = pad_to
        self._fits: dict[torch.Size, int] = {}
        self._on_gpu = _on_gpu(autoencoder.device)
        self._inputs: dict[torch.Size, deque[_Input]] = {}
        self._busy: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        if self._on_gpu:
            self._copies_in, self._copies_out = (_stream(autoencoder.device) for _ in range(2))

    @property
    def device(self) -> torch.device:
        return self._autoencoder.device

    def launch(self, frames_BTHWC: Tensor) -> Result:
        """Begin to encode uint8 frames (B, T, H, W, 3); raise ConfigError if not one clip fits."""
        frames, start = self._upload(frames_BTHWC) if self._on_gpu else (frames_BTHWC, None)
        shape = frames.shape[1:]
        most = self._pad_to or len(frames)
        parts: list[Tensor] = []
        while not parts:
            limit = min(most, self._fits.get(shape, most))
            try:
                for i in range(0, len(frames), limit):
                    part = self._to_unit(frames[i : i + limit], limit)
                    # No name for what it gives, which would keep it alive when memory runs out.
                    parts.append(
                        self._autoencoder.encode(part).moments[: len(frames) - i].to(torch.float16)
                    )
            except torch.OutOfMemoryError as err:
                parts.clear()
                if limit == 1:
                    raise ConfigError(
                        f"one clip of {'x'.join(map(str, shape[:3]))} does not fit in the memory "
                        f"of {self.device}. Use --dtype bfloat16, tiles, or a smaller resolution."
                    ) from err
            if not parts:  # outside of the handler, whose traceback keeps tensors alive
                del part
                self._fits[shape] = limit // 2
                log.warning("%d clips do not fit in memory; going on with %d.", limit, limit // 2)
                if self._on_gpu:
                    torch.cuda.empty_cache()
        moments = torch.cat(parts)
        if start is not None:
            return self._download(moments, start)
        rows: Moments = moments.cpu().numpy()
        return lambda: rows

    def take_busy_s(self) -> float | None:
        """Return the GPU's seconds in the batches since the last call; None on a CPU.

        Counts what has been waited for; does not wait itself.
        """
        if not self._on_gpu:
            return None
        busy_ms = 0.0
        while self._busy and _is_over(self._busy[0][1]):
            start, end = self._busy.pop(0)
            busy_ms += start.elapsed_time(end)
        return busy_ms / 1000

    def batch_limit(self, clip_shape: torch.Size) -> int | None:
        """Return how many clips of (T, H, W, 3) fit at once, once that has been found out."""
        return self._fits.get(clip_shape)

    def _upload(self, frames: Tensor) -> tuple[Tensor, torch.cuda.Event]:
        """Return frames on the GPU, and an event before what is computed of them."""
        compute, start = torch.cuda.current_stream(self.device), _event(timing=True)
        with torch.cuda.stream(self._copies_in):
            on_device = self._copy_in(frames)
            on_device.record_stream(compute)
        compute.wait_stream(self._copies_in)
        start.record(compute)
        return on_device, start

    def _download(self, moments: Tensor, start: torch.cuda.Event) -> Result:
        end = _event(timing=True)
        end.record(torch.cuda.current_stream(self.device))
        self._busy.append((start, end))
        self._copies_out.wait_event(end)
        with torch.cuda.stream(self._copies_out):
            rows = _pinned(moments.shape, moments.dtype)
            rows.copy_(moments, non_blocking=True)
            moments.record_stream(self._copies_out)
            done = _event()
            done.record(self._copies_out)

        def wait() -> Moments:
            done.synchronize()
            return rows.numpy()

        return wait

    def _copy_in(self, frames: Tensor) -> Tensor:
        ring = self._inputs.setdefault(frames.shape[1:], deque())
        if ring and (len(ring) == INPUTS or _is_over(ring[0].copied)):
            slot = ring.popleft()
            slot.copied.synchronize()
        else:
            slot = _Input(torch.empty(0), _event())
        if len(slot.buffer) < len(frames):
            slot.buffer = _pinned(frames.shape)
        pinned = slot.buffer[: len(frames)]
        pinned.copy_(frames)
        on_device = pinned.to(self._autoencoder.device, non_blocking=True)
        slot.copied.record(self._copies_in)
        ring.append(slot)
        return on_device

    def _to_unit(self, frames: Tensor, size: int) -> Tensor:
        """Return what the autoencoder takes of frames; for a compiled one, filled up to a size."""
        if self._pad_to is not None and len(frames) < size:
            last = frames[-1:].expand(size - len(frames), *frames.shape[1:])
            frames = torch.cat([frames, last])
        return to_unit(frames, self._autoencoder.dtype)


def _on_gpu(device: torch.device) -> bool:
    """Whether work on `device` runs beside this process, in CUDA's streams."""
    return device.type == "cuda"


def _pinned(shape: Sequence[int], dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.empty(tuple(shape), dtype=dtype, pin_memory=True)


# torch does not annotate these.
def _stream(device: torch.device, priority: int = 0) -> torch.cuda.Stream:
    return torch.cuda.Stream(device, priority)  # type: ignore[no-untyped-call]


def _event(*, timing: bool = False) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=timing)  # type: ignore[no-untyped-call]


def _is_over(event: torch.cuda.Event) -> bool:
    return bool(event.query())  # type: ignore[no-untyped-call]
