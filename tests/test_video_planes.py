"""Frames that go to their bucket as planes: equal on every device, right to a level, no bias."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from reducio_latents.core.geometry import Bucket, cover_and_centre
from reducio_latents.encode import encode_corpus
from reducio_latents.errors import ConfigError, StoreError
from reducio_latents.files.source import VideoSource
from reducio_latents.store.commit import ShardKey
from reducio_latents.store.store import open_store
from reducio_latents.video import ClipFrames, get_backend
from reducio_latents.video.pixels import fit_frame, kernel_weights
from reducio_latents.video.planes import LUMA_WEIGHTS, PlaneLayout, Planes, fit_packed, fit_planes
from tests.videos import Recipe, constant_rate, write_frames

Doubles = NDArray[np.float64]
SIDES = st.integers(2, 70)
LAYOUTS = st.builds(
    PlaneLayout,
    height=SIDES,
    width=SIDES,
    down=st.sampled_from([1, 2]),
    across=st.sampled_from([1, 2, 4]),
    matrix=st.sampled_from(sorted(LUMA_WEIGHTS)),
    full_range=st.booleans(),
)


def noise(layout: PlaneLayout, low: int, high: int, seed: int = 0) -> Planes:
    rng = np.random.RandomState(seed)
    return Planes(layout, tuple(rng.randint(low, high, s, np.uint8) for s in layout.shapes))


def rgb_of(planes: Planes) -> Doubles:
    """Return RGB (H, W, 3), neither rounded nor clipped, as H.273 has it."""
    layout = planes.layout
    y, u, v = (
        np.repeat(np.repeat(plane.astype(float), down, 0), across, 1)[
            : layout.height, : layout.width
        ]
        for plane, down, across in zip(
            planes.planes,
            (1, layout.down, layout.down),
            (1, layout.across, layout.across),
            strict=True,
        )
    )
    if not layout.full_range:
        y, u, v = (y - 16) / 219 * 255, (u - 128) / 224 * 255, (v - 128) / 224 * 255
    else:
        u, v = u - 128, v - 128
    red, blue = LUMA_WEIGHTS[layout.matrix]
    r, b = y + 2 * (1 - red) * v, y + 2 * (1 - blue) * u
    return np.stack([r, (y - red * r - blue * b) / (1 - red - blue), b], axis=-1)


def resized(rgb: Doubles, bucket: Bucket, mode: str) -> Doubles:
    fit = cover_and_centre(rgb.shape[0], rgb.shape[1], bucket)
    for axis, (size, start, wanted) in enumerate(
        [(fit.height, fit.top, bucket.height), (fit.width, fit.left, bucket.width)]
    ):
        length = rgb.shape[axis]
        outputs = np.arange(start, start + wanted)
        first, taps, weight = kernel_weights(length, length / size, outputs, mode)
        matrix = np.zeros((wanted, length))
        for i in range(wanted):
            matrix[i, first[i] : first[i] + taps[i]] = weight[: taps[i], i]
        rgb = np.moveaxis(np.tensordot(matrix, rgb, (1, axis)), 0, axis)
    return rgb


@settings(max_examples=40)
@given(LAYOUTS, SIDES, SIDES, st.sampled_from(["bicubic", "bilinear"]))
def test_a_frame_is_the_exact_one_to_a_level_without_a_bias(
    layout: PlaneLayout, height: int, width: int, mode: str
) -> None:
    planes, bucket = noise(layout, 96, 160), Bucket(1, height, width)
    off = fit_planes(planes, bucket, mode) - resized(rgb_of(planes), bucket, mode)
    assert off.shape == (height, width, 3)
    assert np.abs(off).max() < 1
    # Planes are rounded, and one of their values is in several numbers: few of them have a mean.
    assert abs(off.mean()) < 5 / np.sqrt(off.size) + 0.05


@settings(max_examples=40)
@given(LAYOUTS, SIDES, SIDES, st.sampled_from(["bicubic", "bilinear"]))
def test_whole_numbers_give_the_same_bits_without_products_of_matrices(
    layout: PlaneLayout, height: int, width: int, mode: str
) -> None:
    bucket, edge = Bucket(2, height, width), noise(layout, 0, 2)
    frames = [noise(layout, 0, 256), edge._replace(planes=tuple(255 * p for p in edge.planes))]
    packed = np.zeros((2, layout.size), np.uint8)
    for frame, memory in zip(frames, packed, strict=True):
        frame.copy_into(memory)
    by_products = [fit_planes(frame, bucket, mode) for frame in frames]
    np.testing.assert_array_equal(
        fit_packed(torch.from_numpy(packed), layout, bucket, mode).numpy(), by_products
    )
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # products may be rounded: they are not used
    try:
        for frame, found in zip(frames, by_products, strict=True):
            np.testing.assert_array_equal(fit_planes(frame, bucket, mode), found)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("matrix", sorted(LUMA_WEIGHTS))
def test_an_even_colour_is_rounded_to_the_nearest(matrix: int) -> None:
    for yuv in [(16, 128, 128), (235, 128, 128), (81, 90, 200), (145, 60, 40)]:
        layout = PlaneLayout(45, 80, 2, 2, matrix, full_range=False)
        planes = Planes(
            layout, tuple(np.full(s, v, np.uint8) for s, v in zip(layout.shapes, yuv, strict=True))
        )
        exact = np.clip(rgb_of(planes)[0, 0], 0, 255)
        frame = fit_planes(planes, Bucket(1, 32, 32), "bicubic")
        assert (frame == frame[0, 0]).all()
        assert np.abs(frame[0, 0] - exact).max() <= 0.56  # weights of 11 bits


def picture(height: int, width: int) -> NDArray[np.uint8]:
    y, x = np.mgrid[:height, :width]
    ramps = [60 + 120 * y / height, 180 - 100 * x / width, 70 + 60 * (x + y) / (height + width)]
    return np.stack(ramps, axis=-1).astype(np.uint8)


KINDS: dict[str, Recipe] = {
    "plain": Recipe(size=(96, 80)),
    "odd": Recipe(size=(95, 79), pix_fmt="yuv444p"),
    "422, turned": Recipe(size=(96, 80), pix_fmt="yuv422p", matrix=(0, 1, -1, 0)),
    "mirrored": Recipe(size=(96, 80), matrix=(-1, 0, 0, 1)),
    "full": Recipe(size=(96, 80), tags=(2, 5, 6, 6)),
}
BUCKET = Bucket(4, 40, 32)


def clip_of(path: Path, *, as_planes: bool) -> tuple[list[type], NDArray[np.uint8]]:
    kinds: list[type] = []

    def fit(frame: NDArray[np.uint8] | Planes) -> NDArray[np.uint8]:
        kinds.append(type(frame))
        if isinstance(frame, Planes):
            return fit_planes(frame, BUCKET, "bicubic")
        return fit_frame(frame, BUCKET, "bicubic")

    backend = get_backend("pyav", as_planes=as_planes)
    [clip] = backend.read_clips(
        VideoSource(str(path)), [0.0], frames=4, rate_fps=16.0, transform=fit
    )
    assert isinstance(clip, ClipFrames)
    return kinds, np.stack(clip.frames)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_picture_that_is_shown(kind: str, tmp_path: Path) -> None:
    recipe = KINDS[kind]
    frames: Sequence[object] = [picture(*recipe.size[::-1])] * 6
    path = write_frames(tmp_path / "a.mp4", frames, constant_rate(6, 16), recipe)
    kinds, planar = clip_of(path, as_planes=True)
    assert set(kinds) == {Planes}
    kinds, usual = clip_of(path, as_planes=False)
    assert set(kinds) == {np.ndarray}
    off = planar.astype(int) - usual
    assert np.abs(off).max() <= 4  # swscale truncates
    assert 0 <= off.mean() < 1.6


@pytest.mark.parametrize(
    "recipe",
    [
        Recipe(pix_fmt="yuv420p10le"),
        Recipe(codec="libx264rgb", pix_fmt="rgb24"),
        Recipe(tags=(1, 9, 9, 16)),
    ],
    ids=["10 bits", "rgb", "pq"],
)
def test_what_is_not_ordinary_is_made_rgb_first(recipe: Recipe, tmp_path: Path) -> None:
    path = write_frames(tmp_path / "a.mp4", [picture(80, 96)] * 6, constant_rate(6, 16), recipe)
    kinds, planar = clip_of(path, as_planes=True)
    assert set(kinds) == {np.ndarray}
    np.testing.assert_array_equal(planar, clip_of(path, as_planes=False)[1])


def test_a_backend_of_rgb_alone_refuses_planes() -> None:
    with pytest.raises(ConfigError, match="decord gives RGB alone"):
        get_backend("decord", as_planes=True)


def test_a_store_keeps_the_colours_it_was_begun_with(tmp_path: Path) -> None:
    corpus, old, new = tmp_path / "corpus", tmp_path / "old", tmp_path / "new"
    corpus.mkdir()
    first = write_frames(corpus / "a.mp4", [picture(80, 96)] * 20, constant_rate(20, 16), Recipe())
    settings: dict[str, Any] = {
        "columns": ("content_image", "caption"), "resolution": 32, "workers": 1
    }  # fmt: skip
    settings["duplicates"] = "encode"
    encode_corpus(corpus, old, colours="swscale", **settings)
    encode_corpus(corpus, new, **settings)
    before = {"resize": "bicubic", "deinterlace": "bwdif"}
    metas = [open_store(store).meta for store in (old, new)]
    assert [meta.colours for meta in metas] == ["swscale", "exact"]
    assert [meta.columns["content_image"].config for meta in metas] == [
        before,
        before | {"colours": "exact"},
    ]
    assert b'"colours"' not in (old / "zarr.json").read_bytes()  # as it always was
    assert metas[0].columns["caption"] == metas[1].columns["caption"]
    shutil.copy(first, corpus / "b.mp4")
    for store in (old, new):
        other = "exact" if store == old else "swscale"
        with pytest.raises(StoreError, match="colours"):
            encode_corpus(corpus, store, colours=other, **settings)
        encode_corpus(corpus, store, **settings)
        opened = open_store(store)
        rows = [
            opened.read_row(ShardKey(s.bucket, s.shard), row, "content_image")
            for s in opened.plan.shards()
            for row in range(s.rows)
        ]
        assert len(rows) == 2
        assert rows[0] == rows[1]
    with pytest.raises(ConfigError, match="decord gives RGB alone"):
        encode_corpus(corpus, new, video_backend="decord", **settings)
