"""Sizes: clips in pixels, latents, buckets, and how a frame is fitted to a bucket. Integers only.

Shape letters, the same in every module. Upper case counts pixels, lower case counts latents.
  B batch   C colour channels   T frames   H height   W width
            D latent channels   t          h          w
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
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


def parse_size(size: int | str) -> tuple[int, int]:
    """Read a side in px or `HxW`; return (height, width).

    >>> parse_size(256), parse_size("480x832")
    ((256, 256), (480, 832))
    """
    match = re.fullmatch(r"(\d{1,9})(?:x(\d{1,9}))?", str(size).strip())
    height, width = (0, 0) if match is None else (int(match[1]), int(match[2] or match[1]))
    if min(height, width) < 1:
        raise GeometryError(
            f"resolution is {size!r}; write a side in px, as 256, or height x width, as 480x832."
        )
    return height, width


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
    chunks: tuple[int, int, int, int] | None = None
    """(T0, dT, t0, dt) of a VAE that works in chunks: T0 + k dT frames have t0 + k dt steps."""

    @property
    def _lengths(self) -> tuple[int, int, int, int]:
        """Which clips there are, written as `chunks` are."""
        stride = self.temporal_stride
        return self.chunks or ((1 if self.causal else stride), stride, 1, 1)

    def takes(self, frames: int) -> bool:
        """Whether clips of so many frames have a whole number of latent steps."""
        first, step, _, _ = self._lengths
        return frames >= first and not (frames - first) % step

    def frames_of(self, steps: int) -> int | None:
        """Return how many frames so many latent steps are; None where no clip has so many."""
        frames, more_frames, least, more_steps = self._lengths
        count, rest = divmod(steps - least, more_steps)
        return None if rest or count < 0 else frames + count * more_frames

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """Return (D, t, h, w) for a clip of (T, H, W).

        >>> vae = LatentGeometry(channels=16, temporal_stride=4, spatial_stride=32)
        >>> vae.latent_shape(16, 256, 448)
        (16, 4, 8, 14)
        """
        first, step, steps, more_steps = self._lengths
        if first == step:
            count = _exact("frames", frames, step) - 1
        else:
            count = _chunks(frames, first, step)
        return (
            self.channels,
            steps + count * more_steps,
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


def nearest_multiple(size: int, step: int) -> int:
    """Return the multiple of `step`, 1 or more of it, that is nearest to `size`; halves go down.

    >>> nearest_multiple(250, 32), nearest_multiple(5, 32)
    (256, 32)
    """
    return max(1, (2 * size + step - 1) // (2 * step)) * step


def _exact(name: str, size: int, stride: int) -> int:
    """Return size / stride, or name the nearest size that divides."""
    if size < stride or size % stride:
        usable = nearest_multiple(size, stride)
        raise GeometryError(
            f"{name} is {size}, but the VAE needs a multiple of {stride}. "
            f"Crop or resize the clip to {name}={usable}."
        )
    return size // stride


def _chunks(frames: int, first: int, step: int) -> int:
    """Return k of frames = first + k * step, or name the numbers of frames beside it."""
    if frames < first or (frames - first) % step:
        usable = max(0, frames - first) // step * step + first
        raise GeometryError(
            f"frames is {frames}, but the VAE needs {step}k+{first}. Use clips of {usable} or "
            f"{usable + step} frames."
        )
    return (frames - first) // step


def require_fits(
    buckets: Iterable[Bucket], check_clip: Callable[[int, int, int], object], side: int, model: str
) -> None:
    """Raise GeometryError, naming the nearest that would do, unless a model takes each bucket.

    `check_clip(T, H, W)` raises it for what the model does not take; its sides divide by `side`.
    """
    misfits = []
    for bucket in buckets:
        try:
            check_clip(bucket.frames, bucket.height, bucket.width)
        except GeometryError as err:
            near = _nearest_fit(bucket, check_clip, side)
            misfits.append(f"{bucket}: {err}" + (f" The nearest that fits is {near}." * bool(near)))
    if misfits:
        others = f" (and {len(misfits) - 1} more buckets do not fit)" if len(misfits) > 1 else ""
        raise GeometryError(f"{model} does not take {misfits[0]}{others}")


def _nearest_fit(
    bucket: Bucket, check_clip: Callable[[int, int, int], object], side: int
) -> Bucket | None:
    """Return the bucket nearest in sides, then in frames, that `check_clip` lets pass."""
    middle = math.isqrt(bucket.height * bucket.width)
    for step in (side, 2 * side, 4 * side, 8 * side):  # some models cut windows out of cells
        for size in ((bucket.height, bucket.width), (middle, middle)):  # some take squares alone
            height, width = (nearest_multiple(px, step) for px in size)
            for off in range(max(64, bucket.frames)):
                for frames in (bucket.frames - off, bucket.frames + off):
                    with suppress(GeometryError):
                        check_clip(frames, height, width)
                        return Bucket(frames, height, width)
    return None


def square_bucket(frames: int, side_px: int) -> Bucket:
    return Bucket(frames, side_px, side_px)


def aspect_buckets(
    frames: int,
    height: int,
    width: int | None = None,
    *,
    multiple: int = 32,
    max_aspect: float = 2.0,
) -> tuple[Bucket, ...]:
    """Return the buckets of about height * width pixels, both sides divisible by `multiple`.

    Without a width: of about height**2. For each side the other one is the multiple that comes
    nearest to the area; sizes more elongated than `max_aspect`, and than the one that is given, are
    left out. Ordered from tall to wide, the given one always among them, and with each size the
    same size turned by 90 degrees.

    >>> [b.name for b in aspect_buckets(16, 256, max_aspect=1.5)]
    ['16x288x224', '16x256x256', '16x224x288']
    """
    width = height if width is None else width
    usable = tuple(nearest_multiple(side, multiple) for side in (height, width))
    if usable != (height, width):
        given, use = (
            str(h) if h == w else f"{h}x{w}" for h, w in ((height, width), (usable[0], usable[1]))
        )
        raise GeometryError(
            f"resolution is {given}, but buckets need a multiple of {multiple}. Use {use}."
        )
    if max_aspect < 1:
        raise GeometryError(f"max_aspect is {max_aspect}; it is long side / short side, 1 or more.")
    area = (height // multiple) * (width // multiple)
    most = max(Fraction(max_aspect), Fraction(width, height), Fraction(height, width))
    best: dict[Fraction, tuple[int, int]] = {}
    for long in range(math.isqrt(area - 1) + 1, area + 1):
        short = max(1, (2 * area + long) // (2 * long))  # nearest, halves up
        for sides in {(long, short), (short, long)}:
            aspect = Fraction(sides[1], sides[0])
            if max(aspect, 1 / aspect) > most:
                continue
            # Of sizes of one shape, such as 2:1 of 128x64 and 64x32, the nearest in area.
            rival = best.get(aspect)
            if rival is None or _off(math.prod(sides), area) < _off(math.prod(rival), area):
                best[aspect] = sides
    return tuple(
        Bucket(frames, rows * multiple, columns * multiple)
        for _, (rows, columns) in sorted(best.items())
    )


def _off(area: int, wanted: int) -> Fraction:
    """Return by what factor, 1 or more, a number misses another."""
    factor = Fraction(area, wanted)
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
    return min(buckets, key=lambda b: _off(b.width * height, b.height * width))


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
