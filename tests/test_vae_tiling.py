"""Tiles are cut, blended and put together as the sheet says; the networks do not matter here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from reducio_latents.errors import ConfigError
from reducio_latents.vae.content import ContentMaps
from reducio_latents.vae.tiling import Tiling, assemble, blend, cut, decode_tiled, encode_tiled


class Encoder:
    """Pools pixels to cells, unequally within a tile, so that tiles disagree where they overlap."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, video: Tensor) -> Tensor:
        self.batches.append(video.shape[0])
        cells = [side // 32 for side in video.shape[-2:]]  # 80 px are 2 cells, as in the real one
        pooled = F.avg_pool3d(video, (4, 32, 32))[..., : cells[0], : cells[1]]
        drift = torch.arange(cells[0])[:, None] + 0.1 * torch.arange(cells[1])
        return pooled + drift


def content(image: Tensor) -> ContentMaps:
    mean = image.mean(dim=(2, 3), keepdim=True)  # tells tiles apart
    return ContentMaps(
        F.avg_pool2d(image, 4) + mean, F.avg_pool2d(image, 8) - mean, 2 * F.avg_pool2d(image, 8)
    )


def decoder(z: Tensor, maps: ContentMaps) -> Tensor:
    grown = F.interpolate(z, scale_factor=(4.0, 32.0, 32.0))
    hints = [plane.sum(dim=(2, 3)) * 1e-3 + plane[..., 0, 0] for plane in maps]
    tilt = torch.linspace(0, 1, grown.shape[-1]) + torch.linspace(0, 2, grown.shape[-2])[:, None]
    return grown + torch.stack(hints).sum(0)[:, :, None, None, None] + tilt


def by_the_sheet(rows: list[list[Tensor]], n_of: Any) -> list[list[Tensor]]:
    """The sheet's blend, written cell by cell."""
    rows = [[tile.clone() for tile in row] for row in rows]
    for i, row in enumerate(rows):
        for j, this in enumerate(row):
            if i > 0:
                previous = rows[i - 1][j]
                n = min(n_of(previous.shape[-2]), previous.shape[-2], this.shape[-2])
                for k in range(n):
                    before = previous[..., previous.shape[-2] - n + k, :]
                    this[..., k, :] = before * (1 - k / n) + this[..., k, :] * (k / n)
            if j > 0:
                previous = row[j - 1]
                n = min(n_of(previous.shape[-1]), previous.shape[-1], this.shape[-1])
                for k in range(n):
                    before = previous[..., previous.shape[-1] - n + k]
                    this[..., k] = before * (1 - k / n) + this[..., k] * (k / n)
    return rows


def together(rows: list[list[Tensor]], step: int) -> Tensor:
    cut_ = [[tile[..., :step, :step] for tile in row] for row in rows]
    return torch.cat([torch.cat(row, -1) for row in cut_], -2)


sides = st.integers(1, 12).map(lambda cells: 32 * cells)
tiles = st.sampled_from([32, 64, 96, 128, 256])


def pixels(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape))) * 2 - 1


@settings(max_examples=25)
@given(sides, sides, tiles, st.sampled_from([None, 1, 4, 100]))
def test_moments_are_tiled_as_the_sheet_says(
    height: int, width: int, p: int, max_batch: int | None
) -> None:
    video, c = pixels(2, 3, 4, height, width), p // 32
    found = encode_tiled(Encoder(), video, Tiling(tile_px=p, max_batch=max_batch))

    length = int(1.25 * p)
    rows = [
        [Encoder()(video[..., i : i + length, j : j + length]) for j in range(0, width, p)]
        for i in range(0, height, p)
    ]
    wanted = together(by_the_sheet(rows, lambda _: int(0.25 * c)), c)
    assert found.shape[-2:] == (height // 32, width // 32)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@settings(max_examples=15)
@given(sides, sides, tiles, st.sampled_from([None, 3]))
def test_pixels_and_content_are_tiled_as_the_sheet_says(
    height: int, width: int, p: int, max_batch: int | None
) -> None:
    c = p // 32
    z, image = pixels(1, 3, 1, height // 32, width // 32), pixels(1, 3, height, width)
    found = decode_tiled(content, decoder, z, image, Tiling(tile_px=p, max_batch=max_batch))

    length, cells = int(1.25 * p), int(1.25 * c)
    starts = [[(i, j) for j in range(0, width, p)] for i in range(0, height, p)]
    maps = [[content(image[..., i : i + length, j : j + length]) for i, j in row] for row in starts]
    planes = [
        by_the_sheet([[m[k] for m in row] for row in maps], lambda side: int(side / 1.25 * 0.25))
        for k in range(3)
    ]
    rows = [
        [
            decoder(
                z[..., i // 32 : i // 32 + cells, j // 32 : j // 32 + cells],
                ContentMaps(*(plane[i // p][j // p] for plane in planes)),
            )
            for i, j in row
        ]
        for row in starts
    ]
    wanted = together(by_the_sheet(rows, lambda _: int(0.25 * p)), p)
    assert found.shape[-2:] == (height, width)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-4)


def test_a_frame_of_one_tile_is_encoded_whole() -> None:
    video, network = pixels(2, 3, 4, 256, 224), Encoder()
    assert torch.equal(encode_tiled(network, video, Tiling()), Encoder()(video))
    assert network.batches == [2]


def test_equal_tiles_are_stacked_up_to_the_limit() -> None:
    video = pixels(2, 3, 4, 1024, 1024)  # 4 x 4 tiles: 9 of 320x320, 3 + 3 at the ends, 1 corner
    for limit, batches in (
        (None, [2] * 16),
        (8, [2, 2, 6, 6, 8, 8]),
        (100, [2, 6, 6, 18]),
        (1, [2] * 16),
    ):
        network = Encoder()
        encode_tiled(network, video, Tiling(max_batch=limit))
        assert sorted(network.batches) == batches


def test_tiles_that_agree_blend_to_themselves() -> None:
    plane = torch.ones(1, 1, 40, 40)
    grid = blend(cut(plane, 16, 0.25), lambda _: 4)
    torch.testing.assert_close(assemble(grid, 16), plane)


def test_the_blend_is_differentiable() -> None:
    video = pixels(1, 3, 4, 160, 64).requires_grad_()
    encode_tiled(Encoder(), video, Tiling(tile_px=128)).sum().backward()  # type: ignore[no-untyped-call]
    assert video.grad is not None
    assert torch.isfinite(video.grad).all()


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"tile_px": 250}, "such as 224"),
        ({"tile_px": 0}, "such as 32"),
        ({"overlap": 1.0}, "below 1"),
        ({"overlap": -0.1}, "at least 0"),
        ({"max_batch": 0}, "max_batch must be >= 1"),
    ],
)
def test_a_tiling_cannot_exist_in_a_bad_state(settings_: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Tiling(**settings_)
