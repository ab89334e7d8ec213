"""Sizes: clips in pixels, latents, buckets, and how a frame is fitted to a bucket. Integers only.

Shape letters, the same in every module. Upper case counts pixels, lower case counts latents.
  B batch   C colour channels   T frames   H height   W width
            D latent channels   t          h          w
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Self

from reducio_latents.errors import GeometryError


@dataclass(frozen=True, order=True)
class Bucket:
    """A size to which clips are resized and cropped; its name is `TxHxW`."""

    frames: int
    height: int
    width: int

    def __post_init__(self) -> None:
        if min(self.frames, self.height, self.width) < 1:
            raise GeometryError(f"bucket {self.name} has a side below 1; give TxHxW in pixels.")

    @property
    def name(self) -> str:
        return f"{self.frames}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, name: str) -> Self:
        """Read `16x256x256`.

        >>> Bucket.parse("16x256x448")
        Bucket(frames=16, height=256, width=448)
        """
        match = re.fullmatch(r"(\d+)x(\d+)x(\d+)", name)
        if match is None:
            raise GeometryError(
                f"{name!r} is not a bucket; write frames x height x width, as 16x256x256."
            )
        return cls(*map(int, match.groups()))

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, kw_only=True)
class LatentGeometry:
    """How a VAE maps a clip of pixels to a grid of latents."""

    channels: int
    """Latent channels, D."""
    temporal_stride: int
    """Frames per latent step."""
    spatial_stride: int
    """Pixels per latent cell, the same along H and W."""
    causal: bool = False
    """Whether the first frame has a latent step of its own: T = 1 + temporal_stride * (t - 1)."""

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (D, t, h, w) for a clip of (T, H, W).

        >>> vae = LatentGeometry(channels=16, temporal_stride=4, spatial_stride=32)
        >>> vae.latent_shape(16, 256, 448)
        (16, 4, 8, 14)
        """
        if self.causal:
            steps = 1 + _exact_causal(frames, self.temporal_stride)
        else:
            steps = _exact("frames", frames, self.temporal_stride)
        return (
            self.channels,
            steps,
            _exact("height", height, self.spatial_stride),
            _exact("width", width, self.spatial_stride),
        )

    def check_latents(self, shape: Sequence[int], *, steps: int | None = None) -> None:
        """Raise GeometryError unless `shape` is (B, D, t, h, w), t being `steps` if given."""
        hint = ""
        if len(shape) == 5:
            if shape[1] != self.channels:
                hint = f" Those with {shape[1]} channels were made by another model."
            elif steps in (None, shape[2]):
                return
            else:
                hint = " Were they made with another temporal stride?"
        raise GeometryError(
            f"latents are {tuple(shape)}; this model decodes (B, {self.channels}, "
            f"{'t' if steps is None else steps}, h, w).{hint}"
        )


def _exact(name: str, size: int, stride: int) -> int:
    """Return size / stride, or name a size that would have divided."""
    if size < stride or size % stride:
        usable = max(stride, size // stride * stride)
        raise GeometryError(
            f"{name} is {size}, but the VAE needs a multiple of {stride}. "
            f"Crop or resize the clip to {name}={usable}."
        )
    return size // stride


def _exact_causal(frames: int, stride: int) -> int:
    if frames < 1 or (frames - 1) % stride:
        usable = max(0, frames - 1) // stride * stride + 1
        raise GeometryError(
            f"frames is {frames}, but the VAE needs {stride}k+1. Use clips of {usable} or "
            f"{usable + stride} frames."
        )
    return (frames - 1) // stride


def square_bucket(frames: int, side_px: int) -> Bucket:
    return Bucket(frames, side_px, side_px)


def aspect_buckets(
    frames: int, side_px: int, *, multiple: int = 32, max_aspect: float = 2.0
) -> tuple[Bucket, ...]:
    """Return the buckets of about side_px**2 pixels, both sides divisible by `multiple`.

    For each side the other one is the multiple that comes nearest to the area; sizes more elongated
    than `max_aspect` are left out. Ordered from tall to wide, the square one always among them, and
    with each size the same size turned by 90 degrees.

    >>> [b.name for b in aspect_buckets(16, 256, max_aspect=1.5)]
    ['16x288x224', '16x256x256', '16x224x288']
    """
    if side_px < multiple or side_px % multiple:
        raise GeometryError(
            f"resolution is {side_px}, but buckets need a multiple of {multiple}. "
            f"Use {max(multiple, side_px // multiple * multiple)}."
        )
    if max_aspect < 1:
        raise GeometryError(f"max_aspect is {max_aspect}; it is long side / short side, 1 or more.")
    cells = side_px // multiple
    best: dict[Fraction, tuple[int, int]] = {}
    for long in range(cells, cells * cells + 1):
        short = max(1, (2 * cells * cells + long) // (2 * long))  # nearest, halves up
        for height, width in {(long, short), (short, long)}:
            aspect = Fraction(width, height)
            if max(aspect, 1 / aspect) > max_aspect:
                continue
            # Of sizes of one shape, such as 2:1 of 128x64 and 64x32, the nearest in area.
            rival = best.get(aspect)
            if rival is None or _off(height * width, cells) < _off(rival[0] * rival[1], cells):
                best[aspect] = height, width
    return tuple(
        Bucket(frames, height * multiple, width * multiple)
        for _, (height, width) in sorted(best.items())
    )


def _off(area: int, side: int) -> Fraction:
    """Return by what factor, 1 or more, an area misses that of a square of this side."""
    factor = Fraction(area, side * side)
    return max(factor, 1 / factor)


def nearest_bucket(height: int, width: int, buckets: Sequence[Bucket]) -> Bucket:
    """Return the bucket nearest in log aspect ratio; of equally near ones the first.

    Compared as fractions, so that no rounding of a logarithm decides.
    """
    if height < 1 or width < 1 or not buckets:
        raise GeometryError(
            f"no bucket for a picture of {width}x{height} pixels among {len(buckets)} buckets. "
            "Both sides must be 1 or more, and a bucket given."
        )

    def distance(bucket: Bucket) -> Fraction:
        factor = Fraction(bucket.width * height, bucket.height * width)
        return max(factor, 1 / factor)

    return min(buckets, key=distance)


@dataclass(frozen=True)
class Fit:
    """How a frame fills a bucket: resize to (height, width), then crop at (top, left)."""

    height: int
    width: int
    top: int
    left: int


def cover_and_centre(height: int, width: int, bucket: Bucket) -> Fit:
    """Return the smallest resize that covers the bucket, and the crop that keeps its centre.

    Sizes are rounded half up, so the same frame fits the same way on every machine.
    """
    if height * bucket.width > width * bucket.height:  # taller than the bucket: width decides
        new_height = (2 * height * bucket.width + width) // (2 * width)
        fit_height, fit_width = max(bucket.height, new_height), bucket.width
    else:
        new_width = (2 * width * bucket.height + height) // (2 * height)
        fit_height, fit_width = bucket.height, max(bucket.width, new_width)
    return Fit(
        fit_height, fit_width, (fit_height - bucket.height) // 2, (fit_width - bucket.width) // 2
    )
