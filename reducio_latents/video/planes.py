"""8-bit YUV as decoders give it, resized plane by plane, then made RGB: few pixels to convert.

Whole numbers at every step, so any device and any version of FFmpeg gives the same bits:

1. each plane is resized from above to below, then from left to right, by the kernels of `pixels`
   with integer weights, and rounded to an eighth of a level, not to whole ones; a sample of chroma
   is that of each pixel that shares it, so it has their weights together;
2. the inverse of the colour matrix, in units of 2**-11, gives RGB, rounded once, to the nearest.

So a result is, to within a level, that of making all pixels RGB and then resizing them, where these
need no clipping. Every product and sum stays below 2**24, where
float32 is exact: on a CPU the fast way is to multiply matrices, in whatever order its kernels add.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from reducio_latents.core.geometry import Bucket, cover_and_centre
from reducio_latents.video.pixels import VALUES_AT_ONCE, fit_clip, kernel_weights
from reducio_latents.video.protocol import Frame

ROW_BITS, COLUMN_BITS = 15, 12
"""Of the weights along each axis."""
FRACTION_BITS = 3
COLOUR_BITS = 11
ROWS_AT_ONCE, COLUMNS_AT_ONCE = 16, 32
"""Outputs whose inputs are multiplied at once; more waste products with 0, fewer cost calls."""
LUMA_WEIGHTS = {1: (0.2126, 0.0722), 4: (0.3, 0.11), 5: (0.299, 0.114), 7: (0.212, 0.087)} | {
    9: (0.2627, 0.0593)
}
"""Matrix coefficients of H.273 -> the shares of red and blue in luma."""


@dataclass(frozen=True)
class PlaneLayout:
    """What the planes of a frame are; those of a clip in one buffer lie one behind the other."""

    height: int
    width: int
    """As shown, as all here."""
    down: int
    across: int
    """Lines and columns of luma that share a chroma sample."""
    matrix: int
    """A key of `LUMA_WEIGHTS`."""
    full_range: bool

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """Of Y, U and V."""
        chroma = -(-self.height // self.down), -(-self.width // self.across)
        return ((self.height, self.width), chroma, chroma)

    @property
    def size(self) -> int:
        """Bytes of a frame."""
        return sum(height * width for height, width in self.shapes)


class Planes(NamedTuple):
    """A frame as it was decoded and is shown; its memory is the decoder's."""

    layout: PlaneLayout
    planes: tuple[NDArray[np.uint8], ...]
    """Y, U and V."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """That of the picture: (H, W, 3)."""
        return (self.layout.height, self.layout.width, 3)

    def copy_into(self, memory: NDArray[np.uint8]) -> None:
        """Copy the planes into `layout.size` bytes."""
        start = 0
        for plane in self.planes:
            memory[start : start + plane.size].reshape(plane.shape)[...] = plane
            start += plane.size


@dataclass(frozen=True, eq=False)
class _Axis:
    """Resampling along an axis: each output is a sum of inputs from `start` to `stop`."""

    start: int
    stop: int
    index: Tensor
    """Which inputs, counted from `start`: int64 (taps, outputs)."""
    weight: Tensor
    """int32 (taps, outputs); those of an output sum to 2**bits, so even areas stay as they are."""
    blocks: tuple[tuple[slice, slice, Tensor], ...]
    """Outputs, the inputs that they need, and the matrix between them, float32: whole numbers times
    the power of 2 that makes the products those units which are rounded to next."""

    def sums(self, values: Tensor, dim: int) -> Tensor:
        """Return int32 sums of int32 values along `dim`, on any device."""
        total: Any = 0
        shape = [1] * values.ndim
        shape[dim] = -1
        index, weight = self.index.to(values.device), self.weight.to(values.device)
        for inputs, weights in zip(index, weight, strict=True):
            total = total + values.index_select(dim, inputs) * weights.view(shape)
        return cast(Tensor, total)


class _Plan(NamedTuple):
    """How planes of one layout become frames of one bucket."""

    axes: tuple[tuple[_Axis, _Axis], ...]
    """For Y, U and V: along the rows' axis, and along the columns'."""
    matrix: Tensor
    """(R, G, B) in levels from (Y, U, V) in parts of one: whole numbers times a power of 2."""
    black: Tensor
    """What Y, U and V count from, (3, 1)."""


@lru_cache(maxsize=64)
def _plan(layout: PlaneLayout, bucket: Bucket, mode: str) -> _Plan:
    fit = cover_and_centre(layout.height, layout.width, bucket)
    axes = []
    for down, across in ((1, 1), *[(layout.down, layout.across)] * 2):
        rows = _axis(layout.height, fit.height, fit.top, bucket.height, mode, ROW_BITS, down)
        columns = _axis(layout.width, fit.width, fit.left, bucket.width, mode, COLUMN_BITS, across)
        axes.append((rows, columns))
    red, blue = LUMA_WEIGHTS[layout.matrix]
    green = 1 - red - blue
    luma, chroma = (1.0, 1.0) if layout.full_range else (255 / 219, 255 / 224)
    from_v, from_u = 2 * (1 - red) * chroma, 2 * (1 - blue) * chroma
    matrix = [
        [luma, 0, from_v],
        [luma, -from_u * blue / green, -from_v * red / green],
        [luma, from_u, 0],
    ]
    black = torch.tensor([[0.0 if layout.full_range else 16.0], [128.0], [128.0]])
    whole = (torch.tensor(matrix, dtype=torch.float64) * 2**COLOUR_BITS).round().float()
    units = 2.0 ** -(COLOUR_BITS + FRACTION_BITS)
    return _Plan(tuple(axes), whole * units, black * 2**FRACTION_BITS)


@lru_cache(maxsize=256)
def _axis(
    size_in: int, size_out: int, start: int, size: int, mode: str, bits: int, shared: int
) -> _Axis:
    """Return how outputs `start` to `start + size` of an axis are made.

    Each sample stands for `shared` pixels of the `size_in`, and has the weights of all of them.
    """
    outputs = np.arange(start, start + size)
    pixel, count, of_pixels = kernel_weights(size_in, size_in / size_out, outputs, mode)
    first = pixel // shared
    taps = (pixel + count - 1) // shared + 1 - first
    weight = np.zeros((int(taps.max()), size))
    tap, output = np.nonzero(np.arange(len(of_pixels))[:, None] < count)
    sample = (pixel[output] + tap) // shared - first[output]
    np.add.at(weight, (sample, output), of_pixels[tap, output])
    whole = np.rint(weight * 2**bits)
    whole[whole.argmax(axis=0), outputs - start] += 2**bits - whole.sum(axis=0)
    low, high = int(first.min()), int((first + taps).max())
    blocks, along_rows = [], bits == ROW_BITS
    at_once = ROWS_AT_ONCE if along_rows else COLUMNS_AT_ONCE
    for begin in range(0, size, at_once):
        end = min(begin + at_once, size)
        least, most = first[begin:end].min(), (first + taps)[begin:end].max()
        matrix = np.zeros((end - begin, most - least), np.float32)
        for i in range(begin, end):
            at = first[i] - least
            matrix[i - begin, at : at + taps[i]] = whole[: taps[i], i]
        needed = slice(int(least) - low, int(most) - low)
        matrix *= 2.0 ** -(bits - FRACTION_BITS if along_rows else bits)
        factor = torch.from_numpy(matrix if along_rows else np.ascontiguousarray(matrix.T))
        blocks.append((slice(begin, end), needed, factor))
    index = np.arange(len(whole))[:, None] + first - low
    weights = torch.from_numpy(whole.astype(np.int32))
    return _Axis(
        low, high, torch.from_numpy(index).clamp_(0, high - low - 1), weights, tuple(blocks)
    )


class _Steps:
    """How `fit_planes` goes by one plan: products of matrices, with the memory that they are in.

    It stays in the cache from frame to frame, which new memory would not.
    """

    def __init__(self, plan: _Plan, bucket: Bucket) -> None:
        self.plan = plan
        self.fitted, self.rgb = torch.empty(2, 3, bucket.height, bucket.width)
        self.levels = np.empty(self.rgb.shape, np.uint8)
        self.groups = [self._group(plan.axes[0], self.fitted[:1])]
        self.groups.append(self._group(plan.axes[1], self.fitted[1:]))  # U and V go the same way

    @staticmethod
    def _group(axes: tuple[_Axis, _Axis], fitted: Tensor) -> _Group:
        rows, columns = axes
        count, across = len(fitted), columns.stop - columns.start
        memory = torch.empty(max(len(m.T) for _, _, m in rows.blocks), count, across)
        tall = torch.empty(fitted.shape[1], count, across)
        down = []
        for made, needed, matrix in rows.blocks:
            lines = slice(rows.start + needed.start, rows.start + needed.stop)
            values = memory[: lines.stop - lines.start]
            of_planes = [values.numpy()[:, i] for i in range(count)]
            down.append((lines, of_planes, matrix, values.flatten(1), tall[made].flatten(1)))
        across_rows = [
            (tall[:, i, needed], matrix, fitted[i][:, made])
            for i in range(count)
            for made, needed, matrix in columns.blocks
        ]
        return _Group(slice(columns.start, columns.stop), down, tall, across_rows)


class _Group(NamedTuple):
    """Planes that are fitted side by side."""

    columns: slice
    """Those that are used."""
    down: list[tuple[slice, list[NDArray[np.float32]], Tensor, Tensor, Tensor]]
    """Which lines, where those of each plane go, and a product: matrix, values, where it goes."""
    tall: Tensor
    across: list[tuple[Tensor, Tensor, Tensor]]
    """Products: values, matrix, where it goes."""


_last = threading.local()
"""A thread's last steps: clips of a video go the same way."""


def _steps(plan: _Plan, bucket: Bucket) -> _Steps:
    steps: _Steps | None = getattr(_last, "steps", None)
    if steps is None or steps.plan is not plan:
        steps = _last.steps = _Steps(plan, bucket)
    return steps


def fit_planes(planes: Planes, bucket: Bucket, mode: str) -> Frame:
    """Resize (antialiased) to cover `bucket`, crop the centre, make it RGB: uint8 (H, W, 3)."""
    plan = _plan(planes.layout, bucket, mode)
    if torch.get_float32_matmul_precision() != "highest":  # products might be rounded
        packed = np.empty(planes.layout.size, np.uint8)
        planes.copy_into(packed)
        frame: Frame = _on_device(torch.from_numpy(packed)[None], planes.layout, plan)[0].numpy()
        return frame
    steps = _steps(plan, bucket)
    for group, of_group in zip(steps.groups, (planes.planes[:1], planes.planes[1:]), strict=True):
        used = [plane[:, group.columns] for plane in of_group]
        for lines, places, matrix, values, made in group.down:
            for place, plane in zip(places, used, strict=True):
                np.copyto(place, plane[lines])
            torch.mm(matrix, values, out=made)
        group.tall.round_()
        for values, matrix, made in group.across:
            torch.mm(values, matrix, out=made)
    values = steps.fitted.round_().view(3, -1).sub_(plan.black)
    torch.mm(plan.matrix, values, out=steps.rgb.view(3, -1))
    np.copyto(steps.levels, steps.rgb.round_().clamp_(0, 255).numpy(), casting="unsafe")
    frame = np.empty((bucket.height, bucket.width, 3), np.uint8)
    for channel, plane in enumerate(steps.levels):
        frame[..., channel] = plane
    return frame


def fit_packed(frames: Tensor, layout: PlaneLayout, bucket: Bucket, mode: str) -> Tensor:
    """Fit frames whose planes lie in uint8 (T, layout.size), where they are: uint8 (T, H, W, 3).

    Bit for bit what `fit_planes` makes of each.
    """
    if frames.device.type == "cpu":
        fitted = [fit_planes(_unpacked(f.numpy(), layout), bucket, mode) for f in frames]
        return torch.from_numpy(np.stack(fitted))
    at_once = max(1, VALUES_AT_ONCE // (3 * layout.height * layout.width))
    plan = _plan(layout, bucket, mode)
    return torch.cat([_on_device(part, layout, plan) for part in torch.split(frames, at_once)])


def fit_whole(frames: Tensor, bucket: Bucket, mode: str, layout: PlaneLayout | None) -> Tensor:
    """Fit frames to `bucket` where they are: uint8 (T, h, w, 3), or (T, layout.size) as planes."""
    if layout is None:
        return fit_clip(frames, bucket, mode)
    return fit_packed(frames, layout, bucket, mode)


def _unpacked(frame: NDArray[np.uint8], layout: PlaneLayout) -> Planes:
    return Planes(layout, tuple(_split(frame, layout)))


def _split(frames: Any, layout: PlaneLayout) -> list[Any]:
    """Return the planes (..., height, width) of frames (..., layout.size)."""
    ends = np.cumsum([height * width for height, width in layout.shapes]).tolist()
    starts: Sequence[int] = [0, *ends[:-1]]
    return [
        frames[..., start:end].reshape(*frames.shape[:-1], *shape)
        for start, end, shape in zip(starts, ends, layout.shapes, strict=True)
    ]


def _on_device(frames: Tensor, layout: PlaneLayout, plan: _Plan) -> Tensor:
    """Return frames as `fit_packed` does, in whole numbers and without products of matrices."""
    fitted = []
    for plane, (rows, columns) in zip(_split(frames, layout), plan.axes, strict=True):
        used = plane[:, rows.start : rows.stop, columns.start : columns.stop].to(torch.int32)
        tall = _rounded(rows.sums(used, 1), ROW_BITS - FRACTION_BITS)
        fitted.append(_rounded(columns.sums(tall.int(), 2), COLUMN_BITS).int())
    for values, black in zip(fitted, plan.black.flatten().int().tolist(), strict=True):
        values.sub_(black)
    weights = (plan.matrix * 2 ** (COLOUR_BITS + FRACTION_BITS)).int().tolist()
    sums = [sum(w * v for w, v in zip(row, fitted, strict=True)) for row in weights]
    levels = [
        _rounded(cast(Tensor, total), COLOUR_BITS + FRACTION_BITS).clamp_(0, 255) for total in sums
    ]
    return torch.stack(levels, dim=-1).to(torch.uint8)


def _rounded(values: Tensor, bits: int) -> Tensor:
    """Return whole numbers over 2**bits, as float32, to the nearest one, halves to even."""
    return values.float().mul_(2.0**-bits).round_()
