"""Decoded frames to 8-bit RGB: matrix, range, depth, transfer, transparency.

What a stream says of its colours is believed; an untagged one is BT.709 from 720 lines up (width
from 1280 or height over 576), else BT.601, and limited range unless its pixel format says full.
swscale's fast path does ordinary 8-bit video: it truncates, so results are up to 3 of 255 levels
too dark, 1 on average, as in every program that uses it; rounding would cost seven times the time.
Transparent pictures are laid on black. BT.2020, PQ and HLG go through `tonemap`; the small
difference between the primaries of BT.601, BT.709 and Display P3 is left alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter

from reducio_latents.errors import VideoError
from reducio_latents.video.protocol import Frame
from reducio_latents.video.tonemap import to_sdr

BT601, BT709 = 5, 1
"""swscale's names of two matrices."""
# Numbers of ITU-T H.273, which FFmpeg uses: colour primaries, transfer and matrix coefficients.
_UNTAGGED = (0, 2, 3)
_PQ, _HLG = 16, 18
_PRIMARIES = {1: "bt709", 9: "bt2020", 12: "p3"}
_MATRICES = {1: 1, 4: 4, 5: 5, 6: 5, 7: 7, 9: 9, 10: 9}
"""Matrix coefficients -> swscale's name of them; 5 is BT.601."""
_FULL_RANGE = 2
_EXACT = Interpolation.BICUBIC | Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT


@dataclass(frozen=True)
class ColourTags:
    """How the numbers of a frame are to be read."""

    matrix: int | None
    """For swscale; None if the frame is RGB or grey already."""
    is_tagged: bool
    """Whether the stream says which matrix it is."""
    full_range: bool
    transfer: str
    """`sdr` (whatever its gamma), `pq` or `hlg`."""
    primaries: str

    @classmethod
    def of(cls, frame: Any) -> ColourTags:
        """Read the tags of a frame; raise VideoError for a matrix that cannot be undone here."""
        transfer = {_PQ: "pq", _HLG: "hlg"}.get(int(frame.color_trc), "sdr")
        default = "bt709" if transfer == "sdr" else "bt2020"
        layout = frame.format
        without = layout.is_rgb or layout.has_palette or layout.name.startswith(("gray", "ya"))
        return cls(
            matrix=None if without else _matrix(frame),
            is_tagged=int(frame.colorspace) not in _UNTAGGED,
            full_range=frame.color_range == _FULL_RANGE or layout.name.startswith("yuvj"),
            transfer=transfer,
            primaries=_PRIMARIES.get(int(frame.color_primaries), default),
        )

    @property
    def is_ordinary(self) -> bool:
        """Whether 8-bit RGB is one matrix away."""
        return self.transfer == "sdr" and self.primaries != "bt2020"


def _matrix(frame: Any) -> int:
    tagged = int(frame.colorspace)
    if tagged in _UNTAGGED:
        return BT709 if frame.width >= 1280 or frame.height > 576 else BT601
    if tagged not in _MATRICES:
        raise VideoError(
            f"its colour matrix (H.273 number {tagged}) is not supported; convert it to BT.709"
        )
    return _MATRICES[tagged]


class RgbConverter:
    """Turns frames into RGB; keeps swscale's tables from one frame to the next."""

    def __init__(self) -> None:
        self._scaler = VideoReformatter()

    def convert(self, frame: Any, width: int) -> Frame:
        """Return `frame` as uint8 RGB (H, width, 3), before it is turned."""
        tags = ColourTags.of(frame)
        if not tags.is_ordinary:
            rgb = self._scale(frame, tags, "rgb48le", width)
            return to_sdr(rgb, transfer=tags.transfer, primaries=tags.primaries)
        if frame.format.has_palette or any(part.is_alpha for part in frame.format.components):
            return _on_black(self._scale(frame, tags, "rgba", width))
        return np.ascontiguousarray(self._scale(frame, tags, "rgb24", width), dtype=np.uint8)

    def resize(self, rgb: Frame, width: int, height: int) -> Frame:
        """Return an RGB picture at another size."""
        frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
        scaled = self._scaler.reformat(frame, width, height, "rgb24", interpolation=_EXACT)
        return np.ascontiguousarray(scaled.to_ndarray(), dtype=np.uint8)

    def _scale(self, frame: Any, tags: ColourTags, to: str, width: int) -> Any:
        plain = tags.is_ordinary and width == frame.width
        scaled = self._scaler.reformat(
            frame,
            width=width,
            format=to,
            src_colorspace=tags.matrix,
            src_color_range=_FULL_RANGE if tags.full_range or tags.matrix is None else 1,
            dst_color_range=_FULL_RANGE,
            interpolation=Interpolation.BILINEAR if plain else _EXACT,
            threads=1,
        )
        return scaled.to_ndarray()


def _on_black(rgba: Frame) -> Frame:
    opacity = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * opacity + 127) // 255).astype(np.uint8)
