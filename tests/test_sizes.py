"""Sizes of any shape and length, as they are asked for; and pictures beside videos in one store."""

from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner

from reducio_latents.cli import main
from reducio_latents.core.clips import ClipSpec
from reducio_latents.encode.options import EncodeOptions
from reducio_latents.errors import ConfigError, GeometryError, LatentsError

NAMED = ("16x256x256", "16x480x832", "1x480x832")


@pytest.mark.parametrize(
    ("settings", "buckets", "frames"),
    [
        ({}, ["16x256x256"], 16),
        ({"resolution": "480x832"}, ["16x480x832"], 16),
        ({"buckets": ",".join(NAMED)}, list(NAMED), 16),
        ({"buckets": NAMED[::-1]}, list(NAMED[::-1]), 16),
        ({"buckets": "17x480x840, 1x480x840"}, ["17x480x840", "1x480x840"], 17),
        ({"buckets": NAMED[2]}, [NAMED[2]], 1),
        ({"buckets": "81x64x64", "clip": ClipSpec(frames=81)}, ["81x64x64"], 81),
    ],
)
def test_sizes_are_a_resolution_or_names(
    settings: dict[str, Any], buckets: list[str], frames: int
) -> None:
    options = EncodeOptions(**settings)
    assert [bucket.name for bucket in options.bucket_list(32)] == buckets
    assert options.clip_spec.frames == frames


def test_aspect_buckets_of_a_resolution_have_its_area() -> None:
    found = EncodeOptions(resolution="480x832", buckets="aspect").bucket_list(32)
    assert "16x480x832" in [bucket.name for bucket in found]
    assert all(0.85 < b.height * b.width / (480 * 832) < 1.15 for b in found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"resolution": "480*832"}, "height x width, as 480x832"),
        ({"buckets": "sqare"}, "'sqare' is not a bucket.* Or write square"),
        ({"buckets": ("square", "1x32x32")}, "'square' is not a bucket"),
        ({"buckets": ""}, "'' is not a bucket"),
        ({"buckets": NAMED, "resolution": 512}, "resolution is 512, but buckets name their sizes"),
        ({"buckets": NAMED, "clip": ClipSpec(frames=17)}, "clip.frames is 17, but buckets name"),
    ],
)
def test_sizes_that_contradict_each_other_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises((ConfigError, GeometryError), match=message):
        EncodeOptions(**settings).bucket_list(32)


def test_a_resolution_without_aspect_buckets_is_told_the_nearest_with() -> None:
    with pytest.raises(LatentsError, match="Use 480x832"):
        EncodeOptions(resolution="470x830", buckets="aspect").bucket_list(32)


def test_the_command_line_takes_sizes_repeated_or_with_commas() -> None:
    for arguments in (
        ["--buckets", "16x32x32,1x32x32", "--buckets", "1x64x64"],
        ["--resolution", "32x64"],
    ):
        told = CliRunner().invoke(main, ["plan", "/nowhere", "/tmp/nothing", *arguments])
        assert "there is no such file or folder" in told.output, told.output
    told = CliRunner().invoke(main, ["plan", "/nowhere", "/tmp/nothing", "--resolution", "32y64"])
    assert "height x width, as 480x832" in told.output
