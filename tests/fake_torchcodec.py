"""torchcodec's decoder as far as the package uses it, made of PyAV, where the real one is not."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import av
import numpy as np
import torch

BACKEND = "reducio_latents.video.torchcodec"


class VideoDecoder:
    """Frames by index, turned as they are shown, untagged colours taken for BT.601."""

    def __init__(
        self,
        source: Any,
        *,
        dimension_order: str = "NCHW",
        num_ffmpeg_threads: int = 1,
        device: str | None = None,
        seek_mode: str = "exact",
    ) -> None:
        assert (dimension_order, device, seek_mode) == ("NHWC", "cpu", "exact")
        try:
            data = Path(source).read_bytes() if isinstance(source, str) else source.read()
            self._file: Any = av.open(io.BytesIO(data))
            self._stream = self._file.streams.video[0]
            self._stream.codec_context.thread_count = num_ffmpeg_threads
            shown = [p.pts for p in self._file.demux(self._stream) if p.size and not p.is_discard]
        except av.FFmpegError as err:
            raise RuntimeError(f"Could not open input file: {err}") from err
        self._ticks = sorted(shown)
        self._next = len(shown)
        self._frames: Iterator[Any] = iter(())
        start_s = float(self._ticks[0] * self._stream.time_base)
        self.metadata = SimpleNamespace(begin_stream_seconds=start_s)

    def __len__(self) -> int:
        return len(self._ticks)

    def get_frame_at(self, index: int) -> Any:
        if index < self._next:
            self._file.seek(0)
            self._frames, self._next = self._file.decode(self._stream), 0
        for frame in self._frames:
            self._next += 1
            if frame.pts == self._ticks[index]:
                picture = np.rot90(frame.to_ndarray(format="rgb24"), frame.rotation // 90)
                data = torch.from_numpy(np.ascontiguousarray(picture))
                return SimpleNamespace(data=data, pts_seconds=frame.time)
        raise RuntimeError("Requested next frame while there are no more frames left to decode.")


@contextmanager
def torchcodec_or_fake() -> Iterator[None]:
    """Have `import torchcodec` find the real one, else this."""
    try:
        importlib.import_module("torchcodec.decoders")
    except (ImportError, OSError, RuntimeError):
        decoders = ModuleType("torchcodec.decoders")
        decoders.VideoDecoder = VideoDecoder  # type: ignore[attr-defined]
        sys.modules |= {"torchcodec": ModuleType("torchcodec"), decoders.__name__: decoders}
    try:
        yield
    finally:
        if getattr(sys.modules["torchcodec"], "__file__", None) is None:
            for name in ("torchcodec", "torchcodec.decoders", BACKEND):
                sys.modules.pop(name, None)
