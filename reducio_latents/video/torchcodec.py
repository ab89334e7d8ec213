"""The third backend: torchcodec, which decodes on an NVIDIA GPU where there is one.

Each frame's time is compared with that of its packet, so none comes at a wrong moment. A GPU's
pictures differ from a CPU's by the rounding of their colours, so a store keeps to one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torchcodec.decoders import VideoDecoder

from reducio_latents.errors import VideoError
from reducio_latents.files.source import VideoSource, open_source
from reducio_latents.video.indexed import LARGEST_DISAGREEMENT_S, Facts, IndexedBackend
from reducio_latents.video.protocol import Frame

_ERRORS = (RuntimeError, ValueError, IndexError, AssertionError, OSError)


class TorchcodecBackend(IndexedBackend):
    """Reads ordinary 8-bit video in MP4, MKV, WebM and FLV."""

    name = "torchcodec"
    containers = ("mov", "matroska", "flv", "asf")

    @contextmanager
    def pictures(self, source: VideoSource, facts: Facts) -> Iterator[Callable[[int], Frame]]:
        """See `IndexedBackend.pictures`."""
        with open_source(source) as file:
            try:
                decoder = VideoDecoder(
                    source.url if source.is_plain_file else file,
                    dimension_order="NHWC",
                    num_ffmpeg_threads=self.threads,
                    device="cuda" if torch.cuda.is_available() else "cpu",
                    seek_mode="exact",
                )
            except _ERRORS as err:
                raise self.refusal(source, f"open this file ({_short(err)})") from err
            start_s = decoder.metadata.begin_stream_seconds
            if len(decoder) != len(facts.times_s) or start_s is None:
                raise self.refusal(source, "tell when the frames of this file are shown")

            def get(index: int) -> Frame:
                try:
                    frame = decoder.get_frame_at(index)
                except _ERRORS as err:
                    raise VideoError(f"torchcodec fails ({_short(err)})") from err
                wrong_s = frame.pts_seconds - start_s - facts.times_s[index]
                if not abs(wrong_s) <= LARGEST_DISAGREEMENT_S:
                    raise VideoError(
                        f"torchcodec gives a frame {abs(wrong_s):.3f} s off: "
                        "use --video-backend pyav"
                    )
                picture: Frame = frame.data.cpu().numpy()
                return picture

            yield get


def _short(err: BaseException) -> str:
    return (str(err).strip().partition("\n")[0] or type(err).__name__).rstrip(".")[:120]
