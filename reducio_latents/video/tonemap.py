"""Wide gamut and high dynamic range to the ordinary kind: BT.2020, PQ and HLG -> BT.709 RGB.

The rule, the same for every file, so that equal bytes give equal pictures:
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
from functools import cache

import numpy as np
from numpy.typing import NDArray

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
