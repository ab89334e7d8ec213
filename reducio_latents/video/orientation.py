"""How a stored picture is turned and flipped to be shown."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from reducio_latents.errors import VideoError

_UNIT = 1 << 16  # the matrix is in 16.16 fixed point
_SKEW = 0.02


@dataclass(frozen=True)
class Orientation:
    """One of the eight ways to lay a picture on its axes."""

    transpose: bool = False
    """Swap rows and columns first."""
    flip_rows: bool = False
    """Then reverse the rows: upside down."""
    flip_columns: bool = False
    """Then reverse the columns: left to right."""

    @classmethod
    def from_matrix(cls, matrix: bytes) -> Orientation:
        """Read a display matrix: nine native int32 as FFmpeg hands them out.

        A pixel at (x, y), y downwards, is shown at (a x + c y, b x + d y), where a, b, c, d are its
        entries 0, 1, 3, 4. Raises VideoError for an angle that is no multiple of 90 degrees.
        """
        a, b, _, c, d = (value / _UNIT for value in struct.unpack("=5i", matrix[:20]))
        largest = max(abs(a), abs(b), abs(c), abs(d), 1e-9)
        straight = max(abs(b), abs(c)) <= _SKEW * largest and min(abs(a), abs(d)) > 0
        turned = max(abs(a), abs(d)) <= _SKEW * largest and min(abs(b), abs(c)) > 0
        if straight:
            return cls(flip_rows=d < 0, flip_columns=a < 0)
        if turned:
            return cls(transpose=True, flip_rows=b < 0, flip_columns=c < 0)
        raise VideoError(
            "its display matrix turns the picture by an angle that is no multiple of 90 degrees"
        )

    @classmethod
    def from_degrees(cls, clockwise: int) -> Orientation:
        """Return the turn by a multiple of 90 degrees."""
        return {
            0: cls(),
            90: cls(transpose=True, flip_columns=True),
            180: cls(flip_rows=True, flip_columns=True),
            270: cls(transpose=True, flip_rows=True),
        }[clockwise % 360]

    @property
    def mirrored(self) -> bool:
        return self.transpose ^ self.flip_rows ^ self.flip_columns

    @property
    def rotation(self) -> int:
        """Degrees clockwise, after the mirroring left to right if there is one."""
        if self.transpose:
            return 90 if self.flip_columns else 270
        return 180 if self.flip_rows else 0

    def apply(self, picture_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the picture as it is shown, C-contiguous."""
        return np.ascontiguousarray(self.view(picture_HWC))

    def view(self, picture: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return a picture (H, W, ...) as it is shown, in the same memory."""
        shown = picture.swapaxes(0, 1) if self.transpose else picture
        rows = slice(None, None, -1 if self.flip_rows else 1)
        columns = slice(None, None, -1 if self.flip_columns else 1)
        return shown[rows, columns]

    def size(self, width: int, height: int) -> tuple[int, int]:
        """Return (width, height) as shown."""
        return (height, width) if self.transpose else (width, height)
