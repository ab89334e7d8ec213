"""Frames too large to encode or decode whole: overlapping tiles, blended where they meet.

With tiles of P pixels and an overlap of 1/4, tiles start every P pixels and are 1.25 P long, less
where the frame ends. Networks see each tile alone. Then the last n cells of a tile are blended into
the first n of the next one, each tile is cut to P, and the pieces are put together:

    frame     |0        P        2P   |
    tile 0    |-----------|
    tile 1             |-----------|
    tile 2                      |-----|
    kept      |========|========|=====|

The published blend joins the END of one tile with the START of the next, although these lie over
different pixels (the last n end at 1.25 P, the first n start at P). Kept so: the numbers depend
on it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from reducio_latents.errors import ConfigError
from reducio_latents.vae.config import SPATIAL_STRIDE
from reducio_latents.vae.content import ContentMaps

TileT = TypeVar("TileT")
Grid = list[list[TileT]]
"""Rows of tiles, top to bottom, each from left to right."""
Tensors = tuple[Tensor, ...]


@dataclass(frozen=True, kw_only=True)
class Tiling:
    """How a frame is cut. The published models were used with tiles of 256 px and 0.25 overlap."""

    tile_px: int = 256
    """Pixels from the start of one tile to the next, P."""
    overlap: float = 0.25
    """How much longer than P a tile is, as a share of P; also the share that is blended."""
    max_batch: int | None = None
    """Stack tiles of equal size until a network sees this many tiles (of all clips) at once. None:
    one tile of each clip. Changes memory and speed, not what is computed."""

    def __post_init__(self) -> None:
        if self.tile_px < SPATIAL_STRIDE or self.tile_px % SPATIAL_STRIDE:
            usable = max(SPATIAL_STRIDE, self.tile_px // SPATIAL_STRIDE * SPATIAL_STRIDE)
            raise ConfigError(
                f"tile_px is {self.tile_px}, but tiles start on latent cells of {SPATIAL_STRIDE} "
                f"pixels. Use a multiple of {SPATIAL_STRIDE}, such as {usable}."
            )
        if not 0 <= self.overlap < 1:
            raise ConfigError(f"overlap must be at least 0 and below 1, got {self.overlap}.")
        if self.max_batch is not None and self.max_batch < 1:
            raise ConfigError(f"max_batch must be >= 1, got {self.max_batch}.")

    @property
    def tile_cells(self) -> int:
        """Latent cells from the start of one tile to the next."""
        return self.tile_px // SPATIAL_STRIDE


def encode_tiled(network: Callable[[Tensor], Tensor], video: Tensor, tiling: Tiling) -> Tensor:
    """Return the moments (B, 2D, t, h, w) of a video (B, 3, T, H, W), encoded tile by tile."""
    cells = tiling.tile_cells
    inputs: Grid[Tensors] = [[(x,) for x in r] for r in cut(video, tiling.tile_px, tiling.overlap)]
    outputs = map_tiles(lambda x: (network(x),), inputs, tiling.max_batch)
    moments = [[tile for (tile,) in row] for row in outputs]
    n = int(cells * tiling.overlap)
    return assemble(blend(moments, lambda _: n), cells)


def decode_tiled(
    content_network: Callable[[Tensor], ContentMaps],
    network: Callable[[Tensor, ContentMaps], Tensor],
    latents: Tensor,
    content_image: Tensor,
    tiling: Tiling,
) -> Tensor:
    """Return the video (B, 3, T, H, W) of latents (B, D, t, h, w), decoded tile by tile.

    Each tile attends to the content of its own tile of the image, blended with its neighbours'.
    """
    images: Grid[Tensors] = [
        [(x,) for x in row] for row in cut(content_image, tiling.tile_px, tiling.overlap)
    ]
    contents = _blend_content(map_tiles(content_network, images, tiling.max_batch), tiling)
    cells = cut(latents, tiling.tile_cells, tiling.overlap)
    inputs: Grid[Tensors] = [
        [(z, *maps) for z, maps in zip(*rows, strict=True)]
        for rows in zip(cells, contents, strict=True)
    ]
    outputs = map_tiles(lambda z, *m: (network(z, ContentMaps(*m)),), inputs, tiling.max_batch)
    n = int(tiling.tile_px * tiling.overlap)
    pixels = blend([[tile for (tile,) in row] for row in outputs], lambda _: n)
    return assemble(pixels, tiling.tile_px)


def cut(x: Tensor, step: int, overlap: float) -> Grid[Tensor]:
    """Return views of the tiles of x (..., H, W); they start every `step` cells."""
    length = int(step * (1 + overlap))
    height, width = x.shape[-2:]
    return [
        [x[..., i : i + length, j : j + length] for j in range(0, width, step)]
        for i in range(0, height, step)
    ]


def map_tiles(
    network: Callable[..., Tensors], grid: Grid[Tensors], max_batch: int | None
) -> Grid[Tensors]:
    """Call `network` on the tensors of each tile; tiles of one shape are stacked along the batch.

    max_batch bounds the batch of a call; a tile of a batch of clips is never split.
    """
    done: dict[tuple[int, int], Tensors] = {}
    for places in _stacks(grid, max_batch):
        tiles = [grid[i][j] for i, j in places]
        outputs = network(*(_stack(parts) for parts in zip(*tiles, strict=True)))
        pieces = (x.chunk(len(tiles)) for x in outputs)
        done.update(zip(places, zip(*pieces, strict=True), strict=True))
    return [[done[i, j] for j in range(len(row))] for i, row in enumerate(grid)]


def _stack(parts: Tensors) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _stacks(grid: Grid[Tensors], max_batch: int | None) -> Iterator[list[tuple[int, int]]]:
    """Yield the places of tiles that one call takes: equal in shape, at most max_batch in all."""
    by_shape = defaultdict(list)
    for i, row in enumerate(grid):
        for j, tile in enumerate(row):
            by_shape[tuple(x.shape for x in tile)].append((i, j))
    clips = grid[0][0][0].shape[0]
    size = max(1, (max_batch or 1) // max(1, clips))
    for places in by_shape.values():
        for start in range(0, len(places), size):
            yield places[start : start + size]


def blend(grid: Grid[Tensor], n_of: Callable[[int], int]) -> Grid[Tensor]:
    """Blend each tile (..., h, w) with the one above, then with the one to its left.

    Both are taken as already blended themselves, and uncut. n_of(side of that neighbour) is the
    number of cells to blend, fewer where one of the two has fewer.
    """
    blended: Grid[Tensor] = []
    for i, row in enumerate(grid):
        blended.append([])
        for j, tile in enumerate(row):
            if i > 0:
                tile = _join(blended[i - 1][j], tile, n_of, dim=-2)
            if j > 0:
                tile = _join(blended[i][j - 1], tile, n_of, dim=-1)
            blended[i].append(tile)
    return blended


def _join(previous: Tensor, this: Tensor, n_of: Callable[[int], int], dim: int) -> Tensor:
    """Return `this` with its first n cells faded in from the last n of `previous`."""
    side_before, side = previous.shape[dim], this.shape[dim]
    n = min(n_of(side_before), side_before, side)
    if n == 0:
        return this
    ramp = torch.arange(n, device=this.device, dtype=torch.float32) / n
    ramp = ramp.to(this.dtype).reshape((n,) + (1,) * (-dim - 1))
    last, first = previous.narrow(dim, side_before - n, n), this.narrow(dim, 0, n)
    return torch.cat([last * (1 - ramp) + first * ramp, this.narrow(dim, n, side - n)], dim)


def _blend_content(grid: Grid[Tensors], tiling: Tiling) -> Grid[ContentMaps]:
    """Blend each of the maps; they stay one set per tile, uncut, for the tile's own attention."""

    def cells(side: int) -> int:
        return int(side / (1 + tiling.overlap) * tiling.overlap)

    planes = [
        blend([[maps[k] for maps in row] for row in grid], cells)
        for k in range(len(ContentMaps._fields))
    ]
    return [
        [ContentMaps(*(plane[i][j] for plane in planes)) for j in range(len(row))]
        for i, row in enumerate(grid)
    ]


def assemble(grid: Grid[Tensor], step: int) -> Tensor:
    """Cut each tile to its first `step` cells and put the tiles together."""
    rows = [torch.cat([tile[..., :step, :step] for tile in row], dim=-1) for row in grid]
    return torch.cat(rows, dim=-2)
