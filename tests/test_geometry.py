"""Buckets divide by the stride, nearest is exact, a fitted frame covers its bucket."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reducio_latents.core.geometry import (
    Bucket,
    LatentGeometry,
    aspect_buckets,
    cover_and_centre,
    nearest_bucket,
    parse_size,
    require_fits,
    square_bucket,
)
from reducio_latents.errors import GeometryError

sides = st.integers(1, 8192)
buckets = st.builds(
    Bucket, st.just(16), *[st.integers(1, 40).map(lambda n: 32 * n) for _ in range(2)]
)


@pytest.mark.parametrize("side_px", [256, 512, 1024])
def test_aspect_buckets_divide_by_32_and_keep_the_area(side_px: int) -> None:
    found = aspect_buckets(16, side_px)
    for bucket in found:
        assert bucket.height % 32 == bucket.width % 32 == 0
        assert 0.88 < bucket.height * bucket.width / side_px**2 < 1.12
        assert 0.5 <= bucket.width / bucket.height <= 2
    assert square_bucket(16, side_px) in found


@given(st.integers(2, 40), st.sampled_from([8, 32, 64]), st.floats(1, 6))
def test_aspect_buckets_are_closed_under_turning_and_differ_in_shape(
    cells: int, multiple: int, max_aspect: float
) -> None:
    found = aspect_buckets(16, cells * multiple, multiple=multiple, max_aspect=max_aspect)
    assert {(b.width, b.height) for b in found} == {(b.height, b.width) for b in found}
    aspects = [b.width / b.height for b in found]
    assert aspects == sorted(set(aspects))


@pytest.mark.parametrize(("side_px", "usable"), [(100, "96"), (16, "32"), (257, "256")])
def test_a_resolution_that_does_not_divide_is_told_one_that_does(side_px: int, usable: str) -> None:
    with pytest.raises(GeometryError, match=f"Use {usable}"):
        aspect_buckets(16, side_px)


@given(st.integers(1, 40), st.integers(1, 40))
def test_aspect_buckets_of_any_size_have_that_size_among_them_and_its_area(
    rows: int, columns: int
) -> None:
    given_size = Bucket(16, 32 * rows, 32 * columns)
    found = aspect_buckets(16, given_size.height, given_size.width)
    assert given_size in found
    assert {(b.width, b.height) for b in found} == {(b.height, b.width) for b in found}
    with pytest.raises(GeometryError, match="Use 32x64"):
        aspect_buckets(16, 40, 60)


@pytest.mark.parametrize(
    ("text", "size"),
    [(256, (256, 256)), ("256", (256, 256)), ("480x832", (480, 832)), ("832x480", (832, 480))],
)
def test_a_resolution_is_a_side_or_height_x_width(text: int | str, size: tuple[int, int]) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", 0, -1, "480x", "480x832x3", "0x832", "480X832", "a", "1e3"])
def test_what_is_no_resolution_is_told_the_two_forms(text: int | str) -> None:
    with pytest.raises(GeometryError, match="height x width, as 480x832"):
        parse_size(text)


def _takes(geometry: LatentGeometry, lengths: Collection[int]) -> Callable[[int, int, int], None]:
    def check_clip(frames: int, height: int, width: int) -> None:
        geometry.latent_shape(frames, height, width)
        if frames not in lengths:
            raise GeometryError(f"no clips of {frames}.")

    return check_clip


@pytest.mark.parametrize(
    ("bucket", "nearest"),
    [
        ("16x480x830", "17x480x832"),
        ("17x470x832", "17x472x832"),
        ("80x480x832", "81x480x832"),
        ("500x480x832", "81x480x832"),
        ("2x3x5", "1x8x8"),
    ],
)
def test_a_bucket_that_a_model_does_not_take_is_told_the_nearest_that_it_does(
    bucket: str, nearest: str
) -> None:
    wan = LatentGeometry(channels=16, temporal_stride=4, spatial_stride=8, causal=True)
    check_clip = _takes(wan, range(82))
    asked = Bucket.parse(bucket)
    with pytest.raises(GeometryError, match=f"wan does not take {bucket}: .*{nearest}"):
        require_fits([asked], check_clip, 8, "wan")
    require_fits([Bucket.parse(nearest)], check_clip, 8, "wan")


@given(sides, sides, st.lists(buckets, min_size=1, max_size=12, unique=True))
def test_the_nearest_bucket_is_nearest_in_log_aspect(
    height: int, width: int, choice: list[Bucket]
) -> None:
    def distance(bucket: Bucket) -> float:
        return abs(math.log(bucket.width / bucket.height) - math.log(width / height))

    nearest = nearest_bucket(height, width, choice)
    assert all(distance(nearest) <= distance(other) + 1e-12 for other in choice)


def test_of_equally_near_buckets_the_first_is_taken_exactly() -> None:
    # log(3) rounds; as fractions 3:1 and 1:3 are equally far from the square.
    tall, wide = Bucket(16, 96, 32), Bucket(16, 32, 96)
    assert nearest_bucket(100, 100, [tall, wide]) == tall
    assert nearest_bucket(100, 100, [wide, tall]) == wide


def test_a_picture_without_pixels_has_no_bucket() -> None:
    with pytest.raises(GeometryError, match="0x5 pixels"):
        nearest_bucket(5, 0, [square_bucket(16, 32)])
    with pytest.raises(GeometryError, match="0 buckets"):
        nearest_bucket(5, 5, [])


@given(sides, sides, buckets)
def test_a_fitted_frame_covers_the_bucket_and_touches_two_of_its_sides(
    height: int, width: int, bucket: Bucket
) -> None:
    fit = cover_and_centre(height, width, bucket)
    assert fit.height >= bucket.height
    assert fit.width >= bucket.width
    assert fit.height == bucket.height or fit.width == bucket.width
    # The crop is inside and centred to within the pixel that an odd margin leaves over.
    for size, side, begin in (
        (fit.height, bucket.height, fit.top),
        (fit.width, bucket.width, fit.left),
    ):
        after = size - side - begin
        assert 0 <= begin <= after <= begin + 1


@given(sides, sides, buckets)
def test_fitting_keeps_the_aspect_to_within_half_a_pixel(
    height: int, width: int, bucket: Bucket
) -> None:
    fit = cover_and_centre(height, width, bucket)
    scale = max(bucket.height / height, bucket.width / width)
    assert abs(fit.height - height * scale) <= 0.5 + 1e-6
    assert abs(fit.width - width * scale) <= 0.5 + 1e-6


@given(sides, sides, buckets)
def test_a_turned_frame_is_fitted_to_a_turned_bucket_alike(
    height: int, width: int, bucket: Bucket
) -> None:
    fit = cover_and_centre(height, width, bucket)
    turned = cover_and_centre(width, height, Bucket(16, bucket.width, bucket.height))
    assert (turned.width, turned.height, turned.left, turned.top) == (
        (fit.height, fit.width, fit.top, fit.left)
    )


@given(buckets)
def test_a_buckets_name_reads_back(bucket: Bucket) -> None:
    assert Bucket.parse(bucket.name) == bucket


@pytest.mark.parametrize("name", ["", "16x256", "16x256x256x3", "16x256 x256", "ax1x1", "0x32x32"])
def test_a_name_that_is_no_bucket_is_refused(name: str) -> None:
    with pytest.raises(GeometryError):
        Bucket.parse(name)


def test_latents_of_a_causal_vae_have_one_step_for_the_first_frame() -> None:
    vae = LatentGeometry(channels=16, temporal_stride=4, spatial_stride=8, causal=True)
    assert vae.latent_shape(17, 64, 64) == (16, 5, 8, 8)
    with pytest.raises(GeometryError, match="Use clips of 13 or 17 frames"):
        vae.latent_shape(16, 64, 64)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((15, 256, 256), "frames=16"),
        ((16, 250, 256), "height=256"),
        ((16, 230, 256), "height=224"),
        ((16, 256, 30), "width=32"),
    ],
)
def test_a_clip_that_does_not_divide_is_told_a_size_that_does(
    size: tuple[int, int, int], message: str
) -> None:
    vae = LatentGeometry(channels=16, temporal_stride=4, spatial_stride=32)
    with pytest.raises(GeometryError, match=message):
        vae.latent_shape(*size)
