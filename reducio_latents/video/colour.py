"""Decoded frames to 8-bit RGB: matrix, range, depth, transfer, transparency.

What a stream says of its colours is believed; an untagged one is BT.709 from 720 lines up (width
from 1280 or height over 576), else BT.601, and limited range unless its pixel format says full.
What `planes_of` gives is made RGB by `planes`; of other 8-bit video swscale's fast path
makes it: it truncates, so results are up to 3 of 255 levels too dark, 1 on average, as in every
program that uses it; rounding would cost seven times the time.
Transparent pictures are laid on black. The small difference between the primaries of BT.601, BT.709
and Display P3 is left alone.

Wide gamut and high dynamic range become BT.709 by one rule, so equal bytes give equal pictures:
1. light: PQ by SMPTE ST 2084; HLG by BT.2100 with the system gamma 1.2 of a 1000 nit display;
   ordinary BT.2020 by BT.1886, gamma 2.4, with white at 203 nits;
2. for PQ and HLG, brightness is rolled off from 1000 nits (brighter is clipped) to 203 nits, the
   reference white of BT.2408, by the curve of BT.2390 section 5.4 on the largest of R, G and B, so
   that hues stay;
3. primaries are converted to BT.709 by a matrix, what lies outside is clipped, and light is encoded
   with gamma 1 / 2.4.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import av
import numpy as np
from av.video.reformatter import Interpolation, VideoReformatter
from numpy.typing import NDArray

from reducio_latents.errors import VideoError
from reducio_latents.video.orientation import Orientation
from reducio_latents.video.planes import LUMA_WEIGHTS, PlaneLayout, Planes
from reducio_latents.video.protocol import Frame

Floats = NDArray[np.float32]

SOURCE_PEAK_NITS = 1000.0
WHITE_NITS = 203.0
_LEVELS = 1 << 16
_BAND_PIXELS = 1 << 17  # what is worked on at once stays in the cache
_LUMA_2020 = np.array([0.2627, 0.6780, 0.0593], dtype=np.float32)
_TO_709 = {
    "bt2020": np.array(
        [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]]
    ),
    "p3": np.array([[1.2249, -0.2247, 0.0], [-0.0420, 1.0419, 0.0], [-0.0197, -0.0786, 1.0979]]),
    "bt709": np.eye(3),
}
"""Linear light of one set of primaries (white D65) -> that of BT.709. BT.2087, table 1 inverted."""


def pq_to_nits(signal: NDArray[np.float64]) -> NDArray[np.float64]:
    """SMPTE ST 2084: signal in [0, 1] -> nits in [0, 10000]."""
    root = np.power(signal, 32 / 2523)
    return 1e4 * np.power(
        np.maximum(root - 0.8359375, 0) / (18.8515625 - 18.6875 * root), 8192 / 1305
    )


def nits_to_pq(nits: NDArray[np.float64]) -> NDArray[np.float64]:
    """Inverse of `pq_to_nits`."""
    root = np.power(nits / 1e4, 1305 / 8192)
    return np.power((0.8359375 + 18.8515625 * root) / (1 + 18.6875 * root), 2523 / 32)


def hlg_to_scene(signal: NDArray[np.float64]) -> NDArray[np.float64]:
    """BT.2100 HLG: signal in [0, 1] -> scene light in [0, 1]."""
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(signal <= 0.5, signal**2 / 3, (np.exp((signal - c) / a) + b) / 12)


def roll_off(nits: NDArray[np.float64]) -> NDArray[np.float64]:
    """BT.2390 section 5.4: nits up to SOURCE_PEAK_NITS -> nits up to WHITE_NITS; brighter clips."""
    peak = nits_to_pq(np.array(SOURCE_PEAK_NITS))
    top = nits_to_pq(np.array(WHITE_NITS)) / peak
    knee = 1.5 * top - 0.5
    e = np.minimum(nits_to_pq(nits) / peak, 1.0)
    t = np.maximum(e - knee, 0) / (1 - knee)
    spline = (
        (2 * t**3 - 3 * t**2 + 1) * knee
        + (t**3 - 2 * t**2 + t) * (1 - knee)
        + (-2 * t**3 + 3 * t**2) * top
    )
    return pq_to_nits(np.where(e < knee, e, spline) * peak)


def _table(curve: Callable[[NDArray[np.float64]], NDArray[np.float64]]) -> Floats:
    return curve(np.linspace(0.0, 1.0, _LEVELS)).astype(np.float32)


@cache
def _light(transfer: str) -> Floats:
    """16-bit signal -> nits, for HLG -> scene light."""
    if transfer == "pq":
        return _table(pq_to_nits)
    if transfer == "hlg":
        return _table(hlg_to_scene)
    return _table(lambda v: WHITE_NITS * v**2.4)


@cache
def _gains() -> Floats:
    """Square root of (largest of R, G, B / peak), in 65536 steps -> factor that rolls it off."""

    def gain(root: NDArray[np.float64]) -> NDArray[np.float64]:
        nits = np.maximum(SOURCE_PEAK_NITS * root**2, 1e-6)
        return roll_off(nits) / nits

    return _table(gain)


@cache
def _encoded() -> NDArray[np.uint8]:
    """Square root of light / white, in 65536 steps -> 8-bit signal."""
    return np.rint(255 * _table(lambda root: root ** (2 / 2.4))).astype(np.uint8)


def to_sdr(
    rgb_HWC: NDArray[np.uint16], *, transfer: str, primaries: str = "bt2020"
) -> NDArray[np.uint8]:
    """Map full-range 16-bit RGB (H, W, 3) to 8-bit BT.709 RGB of the same size.

    `transfer` is `pq`, `hlg` or `sdr`; `primaries` is `bt2020`, `p3` or `bt709`.
    """
    flat = rgb_HWC.reshape(-1, 3)
    out = np.empty(flat.shape, dtype=np.uint8)
    matrix = (_TO_709[primaries] / WHITE_NITS).astype(np.float32)
    for start in range(0, len(flat), _BAND_PIXELS):
        band = slice(start, start + _BAND_PIXELS)
        nits = _light(transfer)[flat[band].T.astype(np.intp)]  # (3, pixels), a plane a colour
        if transfer == "hlg":
            luma = np.maximum(_LUMA_2020 @ nits, 1e-9)
            nits *= SOURCE_PEAK_NITS * luma**0.2
        if transfer != "sdr":
            brightest = np.maximum(np.maximum(nits[0], nits[1]), nits[2])
            nits *= _gains()[_steps(brightest / SOURCE_PEAK_NITS)]
        out[band] = _encoded()[_steps(matrix @ nits)].T
    return out.reshape(rgb_HWC.shape)


def _steps(light: Floats) -> NDArray[np.intp]:
    """Light in units of its largest value -> the index into a table that is even in its root."""
    steps: NDArray[np.intp] = (np.sqrt(np.clip(light, 0, 1)) * (_LEVELS - 1) + 0.5).astype(np.intp)
    return steps


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


_SHARED = {"20p": (2, 2), "22p": (1, 2), "44p": (1, 1), "40p": (2, 1), "11p": (1, 4)}
"""Pixel format after `yuv4` or `yuvj4` -> `PlaneLayout.down` and `across`, before it is turned."""


def planes_of(frame: Any, orientation: Orientation) -> Planes | None:
    """Return a frame as planes, as it is shown; None unless it is ordinary 8-bit YUV.

    Raises VideoError as `ColourTags.of` does.
    """
    family, _, kind = frame.format.name.partition("4")
    shared = _SHARED.get(kind) if family in ("yuv", "yuvj") else None
    tags = ColourTags.of(frame)
    if shared is None or not tags.is_ordinary or tags.matrix not in LUMA_WEIGHTS:
        return None
    planes = []
    for plane in frame.planes:
        lines = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        planes.append(orientation.view(lines[:, : plane.width]))
    height, width = planes[0].shape
    down, across = shared[::-1] if orientation.transpose else shared
    layout = PlaneLayout(height, width, down, across, tags.matrix, tags.full_range)
    fits = tuple(plane.shape for plane in planes) == layout.shapes
    return Planes(layout, tuple(planes)) if fits else None


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
            return on_black(self._scale(frame, tags, "rgba", width))
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


def on_black(rgba: Frame) -> Frame:
    """Lay a transparent picture (H, W, 4) on black."""
    opacity = rgba[..., 3:].astype(np.uint16)
    return ((rgba[..., :3] * opacity + 127) // 255).astype(np.uint8)
