"""What the pixels of a clip say of it, in numbers that cost next to nothing.

All sums are of whole numbers, so the same frames give the same bits on any machine. Y is luma, 0 to
255: (77 R + 150 G + 29 B) / 256, rounded down. G is every s-th pixel of every s-th row of Y in
every frame, s being the largest odd number up to min(H, W) / 64, or 1: odd, as pictures are full of
blocks of 8 px. C is the whole centre frame of Y. A *step* is from one frame to the next.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from reducio_latents.core.clips import centre_frame

FRAME_SCORES = {
    "motion": "mean over the steps of the mean |difference| of G; 0 for a still clip",
    "motion_max": "the largest step's mean |difference| of G",
    "cut": "how far the largest step stands out: its mean |difference| less that of the larger "
    "neighbour; of all steps the most, 0 at least. A cut is far above 0; a pan, a flash is not",
    "brightness": "mean of G",
    "contrast": "root of the mean over frames of the variance of G within the frame",
    "sharpness": "variance of the Laplacian of C: 4 times a pixel less its 4 neighbours",
    "borders": "share of the picture outside the smallest box with all pixels of C and G that are "
    "not black: 16 or more",
    "frozen": "share of the steps in which no pixel of G changes by more than 2",
}
"""Name -> formula. Differences, brightness and contrast are in levels, 0 to 255. A picture, which
has no step, has 0 in those of steps."""
FORMULAS = 1
"""Part of the fingerprint: another number for other formulas."""
GRID_PX = 64
BLACK, STILL = 16, 2
WEIGHTS = (np.uint16(77), np.uint16(150), np.uint16(29))

Luma = NDArray[np.int16]


def score_frames(frames_THWC: NDArray[np.uint8]) -> dict[str, float]:
    """Return the FRAME_SCORES of one clip, uint8 RGB (T, H, W, 3)."""
    count, height, width, _ = frames_THWC.shape
    grid = max(1, min(height, width) // GRID_PX - 1 | 1)
    sampled = _luma(frames_THWC[:, ::grid, ::grid])
    centre = _luma(frames_THWC[centre_frame(count)])
    changes = np.abs(np.diff(sampled, axis=0)).reshape(count - 1, -1 if count > 1 else 0)
    steps = _sums(changes) / changes[:1].size if count > 1 else np.zeros(1)
    sums, squares = _sums(sampled), _sums_of_squares(sampled)
    pixels = sampled[0].size
    return {
        "motion": float(steps.mean()),
        "motion_max": float(steps.max()),
        "cut": _cut(steps),
        "brightness": float(sums.sum() / sampled.size),
        "contrast": float(np.sqrt(np.mean(squares / pixels - (sums / pixels) ** 2))),
        "sharpness": _sharpness(centre),
        "borders": _borders(centre, sampled, grid),
        "frozen": float((changes.max(axis=1) <= STILL).mean()) if count > 1 else 0.0,
    }


def _luma(frames_THWC: NDArray[np.uint8]) -> Luma:
    """Return Y of frames, or of one, without a copy of what that is a view of."""
    weighted = np.zeros(frames_THWC.shape[:-1], np.uint16)
    for channel, weight in enumerate(WEIGHTS):
        weighted += np.multiply(frames_THWC[..., channel], weight, dtype=np.uint16)
    weighted >>= 8
    return weighted.view(np.int16)


def _sums(values: Luma) -> NDArray[np.int64]:
    """Return the sum of each frame."""
    sums: NDArray[np.int64] = values.reshape(len(values), -1).sum(axis=1, dtype=np.int64)
    return sums


def _sums_of_squares(values: Luma) -> NDArray[np.int64]:
    flat = values.reshape(len(values), -1)
    squares: NDArray[np.int64] = np.einsum("ij,ij->i", flat, flat, dtype=np.int64)
    return squares


def _cut(steps: NDArray[np.float64]) -> float:
    around = np.concatenate([[0.0], steps, [0.0]])
    return max(0.0, float((steps - np.maximum(around[:-2], around[2:])).max()))


def _sharpness(centre: Luma) -> float:
    if min(centre.shape) < 3:
        return 0.0
    edges = centre[1:-1, 1:-1] * np.int16(4)
    for shifted in (centre[:-2, 1:-1], centre[2:, 1:-1], centre[1:-1, :-2], centre[1:-1, 2:]):
        edges -= shifted
    total, squares = int(edges.sum(dtype=np.int64)), int(_sums_of_squares(edges).sum())
    return float(squares / edges.size - (total / edges.size) ** 2)


def _borders(centre: Luma, sampled: Luma, grid: int) -> float:
    bright = centre >= BLACK
    bright[::grid, ::grid] |= sampled.max(axis=0) >= BLACK
    inside = 1
    for axis in (0, 1):
        lines = np.flatnonzero(bright.any(axis=axis))
        inside *= int(lines[-1] - lines[0] + 1) if len(lines) else 0
    return 1 - inside / bright.size
